"""The same on uvloop."""

import uvloop

import cases_aiohttp

if __name__ == "__main__":
    cases_aiohttp.main(uvloop.run)

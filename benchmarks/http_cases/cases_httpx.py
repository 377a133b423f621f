"""httpx's client. Run by ../http.py; harness.py says what each case does."""

import asyncio

import httpx

import harness


async def client():
    limits = httpx.Limits(max_connections=harness.TASKS, max_keepalive_connections=harness.TASKS)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as session:
        async def get(url):
            response = await session.get(url)
            return response.status_code, response.content
        await harness.measure_client(get, asyncio.gather)


if __name__ == "__main__":
    harness.main(dict(client=lambda: asyncio.run(client())), httpx.__version__)

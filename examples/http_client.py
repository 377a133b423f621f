"""Many requests at once over few connections, with limits of time, retries, and errors that say what happened.

The server answers every third request with 503 at first; nobody who asks notices.
"""

import flowcoro
from flowcoro_http import HttpClient, HttpServer, RequestError, Retries, Timeouts

app = HttpServer()
refused = set()


@app.get("/items/{number:int}")
async def item(request, number):
    if number % 3 == 0 and number not in refused:
        refused.add(number)
        return 503, "busy", [("Retry-After", "0")]
    return {"number": number, "square": number**2}


async def fetch(client, number, found):
    try:
        response = (await client.get(f"/items/{number}")).raise_for_status()
        found[number] = response.json()["square"]
    except RequestError as error:       # no connection, no answer in time, no HTTP, an error status
        print(f"{number}: {error}")


async def main():
    async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as serving:
        serving.spawn(server.serve())
        found, retries = {}, Retries(count=2, wait=0.01)
        async with HttpClient(base_url=server.url, max_connections=4, timeout=Timeouts(total=10), retries=retries) as client:
            async with flowcoro.TaskGroup() as group:
                for number in range(20):
                    group.spawn(fetch(client, number, found))
            [pool] = client.statistics().values()
        server.close()
    print(f"{len(found)} answers over {pool['created']} connections, {len(refused)} after another try")
    assert found == {number: number**2 for number in range(20)} and pool["created"] <= 4


if __name__ == "__main__":
    flowcoro.run(main())

"""A service in five minutes: notes in SQLite, written as JSON or by a form, on a page that shows each as it comes.

`python -m flowcoro serve five_minutes:app` serves it. The notes are in notes.db."""
import contextlib
import dataclasses
import sqlite3
import flowcoro
from flowcoro_http import FormFile, HttpServer, Response, ServerSentEvent, event_stream, last_event_id

PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>Notes</title><ul id="notes"></ul>
<form action="/notes/file" method="post" enctype="multipart/form-data"><input type="file" name="file"><button>Send</button></form>
<script>new EventSource("/events").onmessage = event => document.getElementById("notes").appendChild(
    document.createElement("li")).textContent = JSON.parse(event.data).text</script>"""
app, news = HttpServer(), flowcoro.Broadcast(1)

@dataclasses.dataclass
class Note:
    text: str

async def ask(sql, *values):            # SQLite waits for the disk: in a thread, so that nobody else does
    def in_thread():
        with contextlib.closing(sqlite3.connect("notes.db")) as database, database:     # one transaction
            return [{"id": number, "text": text} for number, text in database.execute(sql, values)]
    return await flowcoro.to_thread(in_thread)

app.on_startup(lambda: ask("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT)"))

@app.post("/notes")
async def write(request, note: Note):   # JSON that is no Note is answered with 422, which says why
    [written] = await ask("INSERT INTO notes (text) VALUES (?) RETURNING *", note.text)
    await news.send(None)
    return 201, written                 # a status, and a dict, which becomes JSON

@app.get("/notes/{number:int}")
async def read(request, number):
    found = await ask("SELECT * FROM notes WHERE id = ?", number)
    return found[0] if found else (404, f"there is no note {number}")

@app.post("/notes/file")
async def write_lines(request):
    file = (await request.form()).get("file")
    if not isinstance(file, FormFile):
        return 400, "there is no file in this form"
    for line in (await file.read()).decode(errors="replace").splitlines():
        await write(request, Note(line))
    return Response.redirect("/")

@app.get("/events")
async def events(request):
    async def notes(last):              # all that this client has not got yet, and then each as it comes
        with news.subscribe("drop") as changes:
            while True:
                for note in await ask("SELECT * FROM notes WHERE id > ? ORDER BY id", last):
                    yield ServerSentEvent(note, id=str(last := note["id"]))
                await changes.receive()
    return event_stream(request, notes(last_event_id(request) or 0))

@app.get("/")
async def page(request):
    return Response(200, PAGE, media_type="text/html; charset=utf-8")

// The WebSocket of Node, undici's: what ../test_websocket_foreign.py talks to.   node --experimental-websocket websocket_node.js URL
// It prints a line of JSON: {"echoes": […], "protocol", "extensions", "theirs": {code, reason, wasClean}, "ours": …, "refused": …}

const url = process.argv[2], found = {};

const event = (target, name) => new Promise(resolve => target.addEventListener(name, resolve, {once: true}));

async function closed(ws) {
    const {code, reason, wasClean} = await event(ws, "close");
    return {code, reason, wasClean};
}

async function main() {
    let ws = new WebSocket(url + "/echo", ["unknown", "chat"]);
    ws.binaryType = "arraybuffer";
    await event(ws, "open");
    found.protocol = ws.protocol;
    found.extensions = ws.extensions;
    found.echoes = [];
    for (const message of ["", "hello", "größe 𝄞", "x".repeat(70000), new Uint8Array([0, 255, 128]), new Uint8Array(200000)]) {
        ws.send(message);
        const {data} = await event(ws, "message");
        found.echoes.push(typeof data == "string" ? [data.length, data.slice(0, 10)] : [...new Uint8Array(data).slice(0, 3), data.byteLength]);
    }
    ws.close(3001, "enough, größe");
    found.ours = await closed(ws);

    ws = new WebSocket(url + "/leave");
    found.theirs = await closed(ws);

    ws = new WebSocket(url + "/nowhere");
    found.refused = (await event(ws, "error")).message;
    console.log(JSON.stringify(found));
}

main();

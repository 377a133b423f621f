// vscode-jsonrpc and jayson, as client and as server: what ../test_rpc_foreign.py talks to. NODE_PATH says where they are.
//
//     node rpc_node.js vscode-client PORT         calls a server, and prints a line of JSON with what it has found
//     node rpc_node.js vscode-server              prints {"port": …}; when who came there has gone, what it has found
//     node rpc_node.js jayson-client PORT
//     node rpc_node.js jayson-server              serves until its stdin ends
//
// Each is for the methods of the test that starts it.

const net = require("net");

const say = found => console.log(JSON.stringify(found));
const error = ({code, message, data}) => ({code, message, data});
const failure = promise => promise.then(result => ({result}), error);

// ---- vscode-jsonrpc

function talk(socket) {
    const rpc = require("vscode-jsonrpc/node");
    return [rpc, rpc.createMessageConnection(new rpc.SocketMessageReader(socket), new rpc.SocketMessageWriter(socket))];
}

async function vscodeClient(port) {
    const socket = net.connect(port, "127.0.0.1");
    const [rpc, connection] = talk(socket);
    const found = {asked: [], progress: []};
    connection.onRequest("answer", question => { found.asked.push(question); return question + "? Yes."; });
    connection.onRequest("refuse", () => { throw new rpc.ResponseError(77, "not today", {until: "tomorrow"}); });
    connection.onRequest("slow", token => new Promise((resolve, reject) => {
        token.onCancellationRequested(() => {
            connection.sendNotification("noticed");
            reject(new rpc.ResponseError(-32800, "cancelled"));
        });
        connection.sendNotification("begun");
    }));
    connection.listen();

    found.placed = await connection.sendRequest("greet", "größe 𝄞", "Servus");
    found.named = await connection.sendRequest("greet", rpc.ParameterStructures.byName, {name: "Ada"});
    found.nothing = await connection.sendRequest("nothing");
    found.large = (await connection.sendRequest("greet", "ä".repeat(300000), "")).length;
    const calls = [], order = [];
    for (let number = 0; number < 50; number++) {
        calls.push(connection.sendRequest("turn", number, 50).then(result => { order.push(number); return result; }));
    }
    found.together = await Promise.all(calls);
    found.order = order;

    found.divided = await failure(connection.sendRequest("divide", 1, 0));
    found.unknown = await failure(connection.sendRequest("unheard-of"));
    found.wrong = await failure(connection.sendRequest("greet", rpc.ParameterStructures.byName, {name: 1}));
    found.broken = await failure(connection.sendRequest("broken"));

    const source = new rpc.CancellationTokenSource();
    const cancelled = failure(connection.sendRequest("forever", source.token));
    await connection.sendRequest("nothing");        // what was sent before has begun
    source.cancel();
    found.cancelled = await cancelled;

    connection.onProgress(new rpc.ProgressType(), "a token", value => found.progress.push(value));
    found.work = await connection.sendRequest("work", rpc.ParameterStructures.byName, {steps: 3, workDoneToken: "a token"});
    found.back = await connection.sendRequest("ask", "Tea");
    found.refused = await connection.sendRequest("be_refused");
    found.gaveUp = await connection.sendRequest("give_up");
    await connection.sendNotification("note", "the last word");
    found.noted = await connection.sendRequest("noted");
    connection.end();
    socket.end();
    say(found);
}

function vscodeServer() {
    const found = {notes: [], unheard: 0};
    const server = net.createServer(socket => {
        const [rpc, connection] = talk(socket);
        connection.onRequest("add", (a, b) => a + b);
        connection.onRequest("greet", ({name}) => "Hello, " + name);
        connection.onRequest("nothing", () => null);
        connection.onRequest("divide", () => { throw new rpc.ResponseError(7, "by zero", [1, 0]); });
        connection.onRequest("slow", token => new Promise((resolve, reject) => {
            token.onCancellationRequested(() => {
                found.cancelled = true;
                reject(new rpc.ResponseError(-32800, "cancelled"));
            });
            connection.sendNotification("begun");
        }));
        connection.onRequest("ask", async question => "You said: " + await connection.sendRequest("answer", question));
        connection.onRequest("give_up", async () => {
            const source = new rpc.CancellationTokenSource();
            const cancelled = failure(connection.sendRequest("forever", source.token));
            await connection.sendRequest("answer", "");
            source.cancel();
            return await cancelled;
        });
        connection.onRequest("work", async ({steps, workDoneToken}) => {
            for (let step = 1; step <= steps; step++) {
                await connection.sendProgress(new rpc.ProgressType(), workDoneToken, step);
            }
            return steps;
        });
        connection.onNotification("note", text => found.notes.push(text));
        connection.onUnhandledNotification(() => found.unheard++);
        connection.onClose(() => { server.close(); say(found); });
        connection.listen();
    });
    server.listen(0, "127.0.0.1", () => say({port: server.address().port}));
}

// ---- jayson

async function jaysonClient(port) {
    const client = require("jayson/promise").Client.tcp({host: "127.0.0.1", port});
    const ask = async (method, params, id) => {
        const answer = await client.request(method, params, id);
        return answer && (answer.error || {result: answer.result, id: answer.id});
    };
    const found = {};
    found.placed = await ask("greet", ["größe 𝄞", "Servus"], 1);
    found.named = await ask("greet", {name: "Ada"}, "an id");
    found.large = (await ask("greet", ["ä".repeat(300000), ""])).result.length;
    found.divided = await ask("divide", [1, 0]);
    found.unknown = await ask("unheard-of", []);
    found.wrong = await ask("greet", {name: 1});
    found.notified = await client.request("note", ["the last word"], null) === undefined;
    const batch = [client.request("greet", ["one", "Hello"], "first", false), client.request("note", ["in a batch"], null, false),
                   client.request("unheard-of", [], "second", false)];
    found.batch = await client.request(batch);
    say(found);
}

function jaysonServer() {
    const jayson = require("jayson"), notes = [];
    const server = new jayson.Server({
        add: ([a, b], done) => done(null, a + b),
        greet: ({name}, done) => done(null, "Hello, " + name),
        divide: (params, done) => done({code: 7, message: "by zero", data: [1, 0]}),
        later: ([what], done) => setTimeout(() => done(null, what), 20),
        note: ([text], done) => { notes.push(text); done(null, null); },
        noted: (params, done) => done(null, notes),
    }).tcp();
    server.listen(0, "127.0.0.1", () => say({port: server.address().port}));
    process.stdin.on("end", () => process.exit(0)).resume();
}

const program = {"vscode-client": vscodeClient, "vscode-server": vscodeServer, "jayson-client": jaysonClient,
                 "jayson-server": jaysonServer}[process.argv[2]];
Promise.resolve(program(Number(process.argv[3]))).catch(error => { console.error(error); process.exit(1); });

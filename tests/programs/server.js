// A server that knows nothing of keepalive: prints its port, then each connection that an error ends, by the peer's
// port. What it is sent is thrown away; a connection that sent something is sent a byte now and then.
"use strict";

const net = require("node:net");

const server = net.createServer((socket) => {
    const port = socket.remotePort;
    let feeding = null;
    socket.on("data", () => {
        feeding ??= setInterval(() => socket.write("."), 200);
    });
    socket.on("error", (error) => console.log(`${port} ${error.code}`));
    socket.on("close", () => clearInterval(feeding));
});

server.listen({ host: "127.0.0.1", port: 0, backlog: 200 }, () => console.log(server.address().port));

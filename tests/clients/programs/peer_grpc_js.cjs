// @grpc/grpc-js, as one of the peers of tests/clients/test_grpc_peers.py: knows bytes, no messages.
const assert = require("node:assert");
const fs = require("node:fs");
const path = require("node:path");
const { createRequire } = require("node:module");

const [address, folder, scenario, modules] = process.argv.slice(2);
const grpc = createRequire(path.join(modules, "x.js"))("@grpc/grpc-js");
const INFER = "/inference.GRPCInferenceService/ModelInfer";
const STREAM = "/inference.GRPCInferenceService/ModelStreamInfer";
const message = (name) => fs.readFileSync(path.join(folder, name));
const same = (bytes) => bytes;
const options = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };
if (scenario === "keepalive") Object.assign(options, { "grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 1000, "grpc.keepalive_permit_without_calls": 1 });
const client = new grpc.Client(address, grpc.credentials.createInsecure(), options);

function unary(name) {
  return new Promise((resolve, reject) => {
    const deadline = new Date(Date.now() + 60_000);
    client.makeUnaryRequest(INFER, same, same, message(`${name}.request`), new grpc.Metadata(), { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

function checked(answer, name) {
  assert(Buffer.compare(answer, message(name)) === 0, `the answer is not ${name}`);
}

const scenarios = {
  async unary() {
    for (let number = 0; number < 100; number++) checked(await unary("small"), "small.answer");
  },
  async error() {
    const error = await unary("missing").then(() => assert.fail("no error"), (error) => error);
    assert.equal(error.code, grpc.status.NOT_FOUND);
    assert(error.metadata.get("grpc-status-details-bin")[0].length > 0);
  },
  async stream() {
    const stream = client.makeBidiStreamRequest(STREAM, same, same);
    let count = 0;
    await new Promise((resolve, reject) => {
      stream.on("data", (answer) => {
        checked(answer, "small.streamed");
        if (++count < 200) stream.write(message("small.request"));
        else stream.end();
      });
      stream.on("status", (status) => (status.code === 0 ? resolve() : reject(new Error(status.details))));
      stream.on("error", reject);
      stream.write(message("small.request"));
    });
    assert.equal(count, 200);
  },
  async large() {
    checked(await unary("large"), "large.answer");
  },
  async thousand() {
    for (const answer of await Promise.all(Array.from({ length: 1000 }, () => unary("small")))) checked(answer, "small.answer");
  },
  async busy() {
    const call = unary("held");
    await new Promise((resolve) => setTimeout(resolve, 500));
    for (const end = Date.now() + 12_000; Date.now() < end; );
    checked(await call, "held.answer");
    checked(await unary("small"), "small.answer");
  },
  async keepalive() {
    checked(await unary("held"), "held.answer");
    checked(await unary("small"), "small.answer");
  },
};

scenarios[scenario]().then(
  () => { console.log("passed"); client.close(); },
  (error) => { console.error(error); process.exit(1); },
);

// @connectrpc/connect-node, as one of the peers of tests/clients/test_grpc_peers.py. It has its messages from a descriptor.
import assert from "node:assert";
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [address, folder, scenario, modules] = process.argv.slice(2);
const require = createRequire(path.join(modules, "x.js"));
const { createClient, Code } = require("@connectrpc/connect");
const { createGrpcTransport } = require("@connectrpc/connect-node");
const { createFileRegistry, fromBinary, toBinary } = require("@bufbuild/protobuf");
const { FileDescriptorSetSchema } = require("@bufbuild/protobuf/wkt");

const message = (name) => fs.readFileSync(path.join(folder, name));
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, message("descriptors")));
const service = registry.getService("inference.GRPCInferenceService");
const { modelInfer, modelStreamInfer } = service.method;
const transport = createGrpcTransport({ baseUrl: `http://${address}`, readMaxBytes: 2 ** 31, writeMaxBytes: 2 ** 31, ...(scenario === "keepalive" ? { pingIntervalMs: 1000, pingTimeoutMs: 1000, pingIdleConnection: true } : {}) });
const client = createClient(service, transport);
const request = (name) => fromBinary(modelInfer.input, message(`${name}.request`));

async function unary(name) {
  return Buffer.from(toBinary(modelInfer.output, await client.modelInfer(request(name), { timeoutMs: 60_000 })));
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
    assert.equal(error.code, Code.NotFound);
    assert(error.metadata.get("grpc-status-details-bin").length > 0);
  },
  async stream() {
    let proceed, count = 0;
    async function* requests() {
      for (let number = 0; number < 200; number++) {
        const answered = new Promise((resolve) => (proceed = resolve));
        yield request("small");
        await answered;
      }
    }
    for await (const answer of client.modelStreamInfer(requests())) {
      checked(Buffer.from(toBinary(modelStreamInfer.output, answer)), "small.streamed");
      count++;
      proceed();
    }
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

await scenarios[scenario]();
console.log("passed");
process.exit(0);

// Generates at several depths with a client that is made from what server reflection tells.
//
//   node script.mjs HOST:PORT PROMPT MAX_TOKENS DEPTH...
//
// prints JSON: the services that the server lists, its number of layers, and the generations.

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const INFERENCE = "fathom.v1.Inference";
const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

// The reflection protocol itself, which every server that speaks it has in common.
const field = (id, type, rule) => (rule ? { id, type, rule } : { id, type });
const reflectionProtocol = {
  nested: {
    "grpc.reflection.v1": {
      nested: {
        ServerReflection: {
          methods: {
            ServerReflectionInfo: {
              requestType: "ServerReflectionRequest",
              requestStream: true,
              responseType: "ServerReflectionResponse",
              responseStream: true,
            },
          },
        },
        ServerReflectionRequest: {
          oneofs: { message_request: { oneof: ["file_containing_symbol", "list_services"] } },
          fields: {
            file_containing_symbol: field(4, "string"),
            list_services: field(7, "string"),
          },
        },
        ServerReflectionResponse: {
          oneofs: {
            message_response: {
              oneof: ["file_descriptor_response", "list_services_response", "error_response"],
            },
          },
          fields: {
            file_descriptor_response: field(4, "FileDescriptorResponse"),
            list_services_response: field(6, "ListServiceResponse"),
            error_response: field(7, "ErrorResponse"),
          },
        },
        FileDescriptorResponse: {
          fields: { file_descriptor_proto: field(1, "bytes", "repeated") },
        },
        ListServiceResponse: { fields: { service: field(1, "ServiceResponse", "repeated") } },
        ServiceResponse: { fields: { name: field(1, "string") } },
        ErrorResponse: {
          fields: { error_code: field(1, "int32"), error_message: field(2, "string") },
        },
      },
    },
  },
};

function stub(definition, name, address) {
  const loaded = grpc.loadPackageDefinition(definition);
  const Client = name.split(".").reduce((scope, part) => scope[part], loaded);
  return new Client(address, grpc.credentials.createInsecure());
}

function reflect(address, request) {
  const definition = protoLoader.fromJSON(reflectionProtocol, OPTIONS);
  const client = stub(definition, "grpc.reflection.v1.ServerReflection", address);
  return new Promise((resolve, reject) => {
    const call = client.ServerReflectionInfo();
    call.on("error", reject);
    call.on("data", (response) => {
      call.end();
      if (response.error_response) reject(new Error(response.error_response.error_message));
      else resolve(response);
    });
    call.write(request);
  }).finally(() => client.close());
}

// A FileDescriptorSet is the files one after another, each with tag and length before it.
function fileDescriptorSet(files) {
  return Buffer.concat(
    files.flatMap((file) => {
      const head = [0x0a];
      let length = file.length;
      for (; length > 0x7f; length >>>= 7) head.push((length & 0x7f) | 0x80);
      return [Buffer.from([...head, length]), file];
    }),
  );
}

const unary = (client, method, request) =>
  new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });

async function streamed(client, request) {
  const messages = [];
  for await (const message of client.GenerateStream(request)) messages.push(message);
  return messages;
}

const [address, prompt, maxTokens, ...depths] = process.argv.slice(2);
const { list_services_response: list } = await reflect(address, { list_services: "" });
const { file_descriptor_response: files } = await reflect(address, {
  file_containing_symbol: INFERENCE,
});
const definition = protoLoader.loadFileDescriptorSetFromBuffer(
  fileDescriptorSet(files.file_descriptor_proto),
  OPTIONS,
);
const client = stub(definition, INFERENCE, address);
const { model } = await unary(client, "GetModel", {});
const generations = [];
for (const depth of depths.map(Number)) {
  const request = {
    prompt,
    depth: { layers: depth },
    sampling: { temperature: 0 },
    stop: { max_tokens: Number(maxTokens), ignore_eos: true },
    output: { token_ids: true },
  };
  const { text, token_ids, served } = await unary(client, "Generate", request);
  const messages = await streamed(client, request);
  generations.push({
    text,
    token_ids,
    served,
    events: messages.map((message) => message.event),
    streamed_token_ids: messages.flatMap((message) => message.delta?.token_ids ?? []),
  });
}
client.close();
const services = list.service.map(({ name }) => name);
console.log(JSON.stringify({ services, num_layers: model.num_layers, generations }));

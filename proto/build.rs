//! Generates client and server code from our .proto files (needs `protoc`).

fn main() -> std::io::Result<()> {
    let files = ["proto/skimmer/control.proto", "proto/skimmer/node.proto"];
    tonic_prost_build::configure().compile_protos(&files, &["proto"])
}

//! Generates client and server code from our .proto files (needs `protoc`).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(&["proto/skimmer/node.proto"], &["proto"])
}

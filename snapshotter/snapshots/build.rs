//! Generates the server and a client of containerd's snapshot service (needs `protoc`).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_protos(&["proto/snapshots.proto"], &["proto"])
}

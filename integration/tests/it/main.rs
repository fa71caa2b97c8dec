//! System tests: real containerd, real registry, real containers. `integration/run` installs what they need.

mod baseline;
mod fixtures;

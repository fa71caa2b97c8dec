//! System tests: real containerd, real registry, real containers. `integration/run` installs what they need.

mod bad_input;
mod baseline;
mod control;
mod corners;
mod debian;
mod fixtures;
mod full_disk;
mod huge;
mod indexes;
mod lifecycle;
mod matrix;
mod pending;
mod pods;
mod swarm_burst;
mod swarm_faults;
mod toc;
mod users;

//! System tests: real containerd, real registry, real containers. `integration/run` installs what they need.

mod bad_input;
mod baseline;
mod completion;
mod control;
mod corners;
mod debian;
mod fixtures;
mod full_disk;
mod huge;
mod indexes;
mod lifecycle;
mod matrix;
mod outages;
mod pending;
mod pods;
mod replicas;
mod swarm_burst;
mod swarm_faults;
mod swarm_indexes;
mod swarm_members;
mod swarm_rights;
mod toc;
mod users;

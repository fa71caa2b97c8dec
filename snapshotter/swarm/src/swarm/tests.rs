//! Whole nodes in one process: real caches and planners, links in memory, a scripted origin, and the
//! real scheduler core where there is one.

mod aged;
mod bench;
mod degraded;
mod documents;
mod led;
mod together;

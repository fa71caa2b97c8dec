-- Clusters, how nodes join them, and who is in. Times are Unix seconds; repositories are one a line.

-- The control plane's own CA: one row.
CREATE TABLE root (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    certificate BLOB NOT NULL,
    private_key BLOB NOT NULL
);

CREATE TABLE clusters (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    certificate BLOB NOT NULL,
    private_key BLOB NOT NULL,
    repositories TEXT NOT NULL,
    created BIGINT NOT NULL
);

CREATE TABLE tokens (
    hash BLOB PRIMARY KEY,
    cluster TEXT NOT NULL REFERENCES clusters (id),
    role TEXT NOT NULL,
    expires BIGINT NOT NULL,
    -- NULL: as often as it is valid
    uses_left BIGINT
);

CREATE TABLE nodes (
    peer TEXT PRIMARY KEY,
    cluster TEXT NOT NULL REFERENCES clusters (id),
    name TEXT NOT NULL,
    zone TEXT NOT NULL,
    role TEXT NOT NULL,
    -- the token that it joined with
    token BLOB NOT NULL,
    enrolled BIGINT NOT NULL,
    -- of the last certificate issued to it
    expires BIGINT NOT NULL,
    -- NULL: in; else why it is out
    revoked TEXT
);

CREATE INDEX nodes_by_cluster ON nodes (cluster);
CREATE INDEX nodes_by_end ON nodes (expires);

CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at BIGINT NOT NULL,
    cluster TEXT NOT NULL,
    what TEXT NOT NULL
);

CREATE INDEX events_by_cluster ON events (cluster, id);

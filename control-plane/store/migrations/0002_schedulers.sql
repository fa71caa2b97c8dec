-- Scheduler processes that run now. Each writes its row again and again; times are Unix milliseconds.

CREATE TABLE schedulers (
    id TEXT PRIMARY KEY,
    -- host:port at which the others reach it
    address TEXT NOT NULL,
    seen BIGINT NOT NULL
);

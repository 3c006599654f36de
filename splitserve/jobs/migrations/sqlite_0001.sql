-- Times are seconds since the epoch on the store's clock (splitserve/jobs/sqlite.py).
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    rights BLOB NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    priority INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL NOT NULL DEFAULT 0,
    finished REAL NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    lease_until REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '',
    timeout_s REAL NOT NULL,
    expires REAL NOT NULL,
    remove_at REAL NOT NULL DEFAULT 0,
    rendering BLOB NOT NULL,
    request BLOB NOT NULL,
    request_ref TEXT NOT NULL,
    answer BLOB NOT NULL DEFAULT x'',
    answer_ref TEXT NOT NULL DEFAULT '',
    error BLOB,
    webhook BLOB,
    delivery BLOB
);

CREATE INDEX jobs_queued ON jobs (priority, seq) WHERE status = 'queued';
CREATE INDEX jobs_oldest ON jobs (seq) WHERE status = 'queued';
CREATE INDEX jobs_expiring ON jobs (expires) WHERE status = 'queued' AND expires > 0;
CREATE INDEX jobs_running ON jobs (lease_until) WHERE status = 'running';
CREATE INDEX jobs_removable ON jobs (remove_at) WHERE remove_at > 0;
CREATE INDEX jobs_owner ON jobs (owner, seq);
CREATE INDEX jobs_refs ON jobs (request_ref) WHERE request_ref <> '';
CREATE INDEX jobs_answer_refs ON jobs (answer_ref) WHERE answer_ref <> '';

-- Idempotency keys. They outlive their jobs.
CREATE TABLE keys (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    job TEXT NOT NULL,
    valid_until REAL NOT NULL,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE INDEX keys_valid_until ON keys (valid_until);

-- The outbox: webhooks to deliver, written in the transaction that ends the job.
CREATE TABLE deliveries (
    id TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    owner TEXT NOT NULL,
    url TEXT NOT NULL,
    host TEXT NOT NULL,
    body BLOB NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending',
    attempt INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    not_before REAL NOT NULL,
    finished REAL NOT NULL DEFAULT 0
);
CREATE INDEX deliveries_due ON deliveries (not_before) WHERE status = 'pending';
CREATE INDEX deliveries_ended ON deliveries (finished) WHERE status <> 'pending';

-- Counts of jobs, kept with each change of state: nothing counts by scanning.
CREATE TABLE tallies (
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (owner, status)
) WITHOUT ROWID;
CREATE TRIGGER jobs_added AFTER INSERT ON jobs BEGIN
    INSERT INTO tallies VALUES (new.owner, new.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER jobs_moved AFTER UPDATE OF status ON jobs WHEN old.status <> new.status BEGIN
    UPDATE tallies SET n = n - 1 WHERE owner = old.owner AND status = old.status;
    INSERT INTO tallies VALUES (new.owner, new.status, 1) ON CONFLICT DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
    UPDATE tallies SET n = n - 1 WHERE owner = old.owner AND status = old.status;
END;

-- Leases, delays and times to live are judged by now(): replicas need not agree on the time.
CREATE TABLE splitserve_jobs.jobs (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text NOT NULL UNIQUE,
    owner text NOT NULL,
    rights bytea NOT NULL,
    model text NOT NULL,
    version text NOT NULL,
    status text NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    priority smallint NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    fence integer NOT NULL DEFAULT 0,
    created timestamptz NOT NULL DEFAULT now(),
    started timestamptz,
    finished timestamptz,
    not_before timestamptz NOT NULL DEFAULT now(),
    worker text NOT NULL DEFAULT '',
    timeout_s double precision NOT NULL,
    expires timestamptz,
    remove_at timestamptz,
    rendering bytea NOT NULL,
    request bytea NOT NULL,
    request_ref text NOT NULL,
    answer bytea NOT NULL DEFAULT '',
    answer_ref text NOT NULL DEFAULT '',
    error bytea,
    webhook bytea,
    delivery bytea
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX jobs_queued ON splitserve_jobs.jobs (priority, seq) WHERE status = 'queued';
CREATE INDEX jobs_oldest ON splitserve_jobs.jobs (seq) WHERE status = 'queued';
CREATE INDEX jobs_expiring ON splitserve_jobs.jobs (expires) WHERE status = 'queued' AND expires IS NOT NULL;
CREATE INDEX jobs_running ON splitserve_jobs.jobs (worker) WHERE status = 'running';
CREATE INDEX jobs_removable ON splitserve_jobs.jobs (remove_at) WHERE remove_at IS NOT NULL;
CREATE INDEX jobs_owner ON splitserve_jobs.jobs (owner, seq);
CREATE INDEX jobs_refs ON splitserve_jobs.jobs (request_ref) WHERE request_ref <> '';
CREATE INDEX jobs_answer_refs ON splitserve_jobs.jobs (answer_ref) WHERE answer_ref <> '';

-- A heartbeat is one row a worker, not one a job.
CREATE TABLE splitserve_jobs.workers (
    id text PRIMARY KEY,
    lease_until timestamptz NOT NULL
) WITH (fillfactor = 10);

-- Idempotency keys. They outlive their jobs.
CREATE TABLE splitserve_jobs.keys (
    owner text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    job text NOT NULL,
    valid_until timestamptz NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX keys_valid_until ON splitserve_jobs.keys (valid_until);

-- The outbox: webhooks to deliver, written in the transaction that ends the job.
CREATE TABLE splitserve_jobs.deliveries (
    id text PRIMARY KEY,
    job text NOT NULL,
    owner text NOT NULL,
    url text NOT NULL,
    host text NOT NULL,
    body bytea NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    attempt integer NOT NULL DEFAULT 0,
    created timestamptz NOT NULL DEFAULT now(),
    not_before timestamptz NOT NULL DEFAULT now(),
    finished timestamptz
);
CREATE INDEX deliveries_due ON splitserve_jobs.deliveries (not_before) WHERE status = 'pending';
CREATE INDEX deliveries_ended ON splitserve_jobs.deliveries (finished) WHERE status <> 'pending';

-- Changes of the counts of jobs, summed up by the sweep: a single row for each count would make all submits wait for each other.
CREATE TABLE splitserve_jobs.tallies (
    owner text NOT NULL,
    status text NOT NULL,
    n bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000);

CREATE FUNCTION splitserve_jobs.count_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO splitserve_jobs.tallies SELECT owner, status, count(*) FROM new_rows GROUP BY owner, status;
    RETURN NULL;
END $$;
CREATE FUNCTION splitserve_jobs.count_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO splitserve_jobs.tallies SELECT owner, status, -count(*) FROM old_rows GROUP BY owner, status;
    RETURN NULL;
END $$;
CREATE FUNCTION splitserve_jobs.count_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO splitserve_jobs.tallies
        SELECT owner, status, sum(n) FROM
            (SELECT owner, status, 1 AS n FROM new_rows UNION ALL SELECT owner, status, -1 FROM old_rows) AS changes
        GROUP BY owner, status HAVING sum(n) <> 0;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_added AFTER INSERT ON splitserve_jobs.jobs REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION splitserve_jobs.count_added();
CREATE TRIGGER jobs_removed AFTER DELETE ON splitserve_jobs.jobs REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION splitserve_jobs.count_removed();
CREATE TRIGGER jobs_moved AFTER UPDATE ON splitserve_jobs.jobs REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION splitserve_jobs.count_moved();

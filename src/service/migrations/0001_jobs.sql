-- BIGINT and TEXT only: what SQLite and PostgreSQL both have and sqlx::Any can carry.
-- Times are milliseconds since 1970 UTC.
CREATE TABLE jobs (
    id               TEXT   NOT NULL PRIMARY KEY, -- UUID version 7: sorted by age
    delivery         TEXT   NOT NULL UNIQUE,      -- X-GitHub-Delivery
    repository       TEXT   NOT NULL,             -- OWNER/NAME
    commit_id        TEXT   NOT NULL,
    branch           TEXT   NOT NULL,
    pull_request     BIGINT NOT NULL,
    title            TEXT   NOT NULL,
    state            TEXT   NOT NULL,             -- queued, running, succeeded, failed, cancelled
    owner            TEXT   NOT NULL,             -- the instance that holds or held the lease
    fence            BIGINT NOT NULL,             -- counts claims; every change names it
    lease_until_ms   BIGINT NOT NULL,
    attempts         BIGINT NOT NULL,
    cancel_requested BIGINT NOT NULL,             -- 0 or 1
    image            TEXT,                        -- what was published, and its digest
    digest           TEXT,
    error            TEXT,
    accepted_at_ms   BIGINT NOT NULL,
    started_at_ms    BIGINT,
    finished_at_ms   BIGINT
);

CREATE INDEX jobs_by_state ON jobs (state, id);

CREATE TABLE job_log (
    job_id TEXT   NOT NULL,
    seq    BIGINT NOT NULL, -- counts from 1 in each job
    at_ms  BIGINT NOT NULL,
    body   TEXT   NOT NULL, -- a LogEvent as JSON
    PRIMARY KEY (job_id, seq)
);

use std::collections::BTreeSet;

use super::*;

const LEASE: Duration = Duration::from_secs(30);

fn request(delivery: &str, repository: &str) -> JobRequest {
    JobRequest {
        delivery: delivery.to_owned(),
        repository: repository.to_owned(),
        commit: "a".repeat(40),
        branch: "develop".to_owned(),
        pull_request: 7,
        title: "it's \"quoted\"; DROP TABLE jobs; --".to_owned(),
    }
}

async fn open() -> (tempfile::TempDir, Jobs) {
    let dir = tempfile::tempdir().unwrap();
    let jobs = Jobs::open(&dir.path().join("jobs ü%20.sqlite"))
        .await
        .unwrap();
    (dir, jobs)
}

async fn accept(jobs: &Jobs, delivery: &str, repository: &str) -> JobId {
    match jobs.accept(&request(delivery, repository), 1000, 5).await {
        Ok(Accepted::New(id)) => id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn security_s21_a_delivery_is_one_job_and_is_there_after_reopening() {
    let (dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    assert_eq!(
        jobs.accept(&request("d1", "o/a"), 1000, 6).await.unwrap(),
        Accepted::Known(id)
    );
    jobs.close().await;
    let jobs = Jobs::open(&dir.path().join("jobs ü%20.sqlite"))
        .await
        .unwrap();
    let job = jobs.get(id).await.unwrap().unwrap();
    assert_eq!(
        job,
        Job {
            id,
            repository: "o/a".to_owned(),
            commit: "a".repeat(40),
            branch: "develop".to_owned(),
            pull_request: 7,
            title: request("", "").title,
            state: State::Queued,
            attempts: 0,
            image: None,
            digest: None,
            error: None,
            accepted_at_ms: 5,
            started_at_ms: None,
            finished_at_ms: None,
        }
    );
    assert_eq!(jobs.list(None, 10).await.unwrap(), [job]);
}

#[tokio::test]
async fn the_database_is_durable_at_every_commit() {
    let (_dir, jobs) = open().await;
    // 2 is FULL.
    let row = sqlx::query("PRAGMA synchronous")
        .fetch_one(&jobs.pool)
        .await
        .unwrap();
    assert_eq!(row.get::<i64, _>(0), 2);
    let row = sqlx::query("PRAGMA journal_mode")
        .fetch_one(&jobs.pool)
        .await
        .unwrap();
    assert_eq!(row.get::<String, _>(0), "wal");
}

#[tokio::test]
async fn a_full_queue_takes_nothing_but_knows_its_deliveries() {
    let (_dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    let again = jobs.accept(&request("d1", "o/a"), 1, 5).await.unwrap();
    assert_eq!(again, Accepted::Known(id));
    let other = jobs.accept(&request("d2", "o/a"), 1, 5).await.unwrap();
    assert_eq!(other, Accepted::Full);
    jobs.claim("me", LEASE, 3, 10).await.unwrap().unwrap();
    let other = jobs.accept(&request("d2", "o/a"), 1, 5).await.unwrap();
    assert!(matches!(other, Accepted::New(_)));
}

#[tokio::test]
async fn the_oldest_is_claimed_first_and_a_repository_once_at_a_time() {
    let (_dir, jobs) = open().await;
    let a1 = accept(&jobs, "d1", "o/a").await;
    let a2 = accept(&jobs, "d2", "o/a").await;
    let b1 = accept(&jobs, "d3", "o/b").await;
    let first = jobs.claim("me", LEASE, 3, 10).await.unwrap().unwrap();
    assert_eq!((first.job.id, first.fence), (a1, 1));
    assert_eq!(first.job.state, State::Running);
    assert_eq!(first.job.attempts, 1);
    let second = jobs.claim("me", LEASE, 3, 10).await.unwrap().unwrap();
    assert_eq!(second.job.id, b1);
    assert!(jobs.claim("me", LEASE, 3, 10).await.unwrap().is_none());
    assert!(jobs.finish(&first, &Ending::Cancelled, 20).await.unwrap());
    let third = jobs.claim("me", LEASE, 3, 30).await.unwrap().unwrap();
    assert_eq!(third.job.id, a2);
}

#[tokio::test]
async fn an_expired_lease_is_claimed_again_and_its_holder_changes_nothing() {
    let (_dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    let old = jobs.claim("old", LEASE, 3, 0).await.unwrap().unwrap();
    assert!(jobs.claim("new", LEASE, 3, 30_000).await.unwrap().is_none());
    assert_eq!(
        jobs.renew(&old, LEASE, 10_000).await.unwrap(),
        Renewal::Held
    );
    assert!(jobs.claim("new", LEASE, 3, 40_000).await.unwrap().is_none());
    let new = jobs.claim("new", LEASE, 3, 40_001).await.unwrap().unwrap();
    assert_eq!((new.job.id, new.fence, new.job.attempts), (id, 2, 2));

    let entry = LogEntry {
        seq: 1,
        at_ms: 1,
        event: LogEvent::service("late"),
    };
    assert_eq!(
        jobs.renew(&old, LEASE, 40_002).await.unwrap(),
        Renewal::Lost
    );
    assert!(!jobs.append(&old, &[entry]).await.unwrap());
    assert!(!jobs.finish(&old, &Ending::Cancelled, 1).await.unwrap());
    assert!(!jobs.release(&old).await.unwrap());
    assert_eq!(jobs.get(id).await.unwrap().unwrap().state, State::Running);
    assert_eq!(jobs.log(id, 0, 10).await.unwrap(), []);
}

#[tokio::test]
async fn a_restart_takes_over_at_once_until_the_attempts_are_used_up() {
    let (_dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    for attempt in 1..=2 {
        let lease = jobs.claim("x", LEASE, 2, 100).await.unwrap().unwrap();
        assert_eq!(lease.job.attempts, attempt);
        assert_eq!(jobs.give_up(2, 100).await.unwrap(), []);
        assert_eq!(jobs.take_over().await.unwrap(), 1);
    }
    assert!(jobs.claim("x", LEASE, 2, 100).await.unwrap().is_none());
    assert_eq!(jobs.give_up(2, 100).await.unwrap(), [id]);
    let job = jobs.get(id).await.unwrap().unwrap();
    assert_eq!(job.state, State::Failed);
    assert_eq!(job.finished_at_ms, Some(100));
    assert_eq!(
        job.error.as_deref(),
        Some("gave up after 2 attempts: the service died each time")
    );
}

#[tokio::test]
async fn a_released_job_waits_again_and_its_attempt_does_not_count() {
    let (_dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    let lease = jobs.claim("x", LEASE, 1, 0).await.unwrap().unwrap();
    assert!(jobs.release(&lease).await.unwrap());
    assert!(!jobs.release(&lease).await.unwrap());
    let lease = jobs.claim("x", LEASE, 1, 0).await.unwrap().unwrap();
    assert_eq!((lease.job.id, lease.job.attempts), (id, 1));
}

#[tokio::test]
async fn endings_are_kept() {
    let (_dir, jobs) = open().await;
    let digest = Digest::of(b"manifest");
    let succeeded = Ending::Succeeded {
        image: "r/a:1".to_owned(),
        digest: digest.clone(),
    };
    let error = Ending::Failed {
        error: "no".to_owned(),
    };
    for (n, ending) in [succeeded, error, Ending::Cancelled].iter().enumerate() {
        let id = accept(&jobs, &format!("d{n}"), "o/a").await;
        let lease = jobs.claim("x", LEASE, 1, 3).await.unwrap().unwrap();
        assert!(jobs.finish(&lease, ending, 9).await.unwrap());
        assert!(!jobs.finish(&lease, &Ending::Cancelled, 10).await.unwrap());
        let job = jobs.get(id).await.unwrap().unwrap();
        assert_eq!(job.finished_at_ms, Some(9));
        let got = (job.state, job.image, job.digest, job.error);
        let expected = match n {
            0 => (
                State::Succeeded,
                Some("r/a:1".to_owned()),
                Some(digest.to_string()),
                None,
            ),
            1 => (State::Failed, None, None, Some("no".to_owned())),
            _ => (State::Cancelled, None, None, None),
        };
        assert_eq!(got, expected);
    }
}

#[tokio::test]
async fn cancelling_ends_what_waits_and_asks_what_runs() {
    let (_dir, jobs) = open().await;
    let running = accept(&jobs, "d1", "o/a").await;
    let waiting = accept(&jobs, "d2", "o/b").await;
    let lease = jobs.claim("x", LEASE, 1, 0).await.unwrap().unwrap();
    assert_eq!(jobs.cancel(running, 4).await.unwrap(), Cancel::Requested);
    assert_eq!(
        jobs.renew(&lease, LEASE, 5).await.unwrap(),
        Renewal::CancelRequested
    );
    assert_eq!(jobs.cancel(waiting, 4).await.unwrap(), Cancel::Done);
    let job = jobs.get(waiting).await.unwrap().unwrap();
    assert_eq!((job.state, job.finished_at_ms), (State::Cancelled, Some(4)));
    assert_eq!(jobs.cancel(waiting, 5).await.unwrap(), Cancel::Ended);
    let nobody = JobId::parse("00000000-0000-7000-8000-000000000000").unwrap();
    assert_eq!(jobs.cancel(nobody, 5).await.unwrap(), Cancel::Unknown);
}

#[tokio::test]
async fn logs_are_read_in_order_and_go_with_their_job() {
    let (_dir, jobs) = open().await;
    let id = accept(&jobs, "d1", "o/a").await;
    let lease = jobs.claim("x", LEASE, 1, 0).await.unwrap().unwrap();
    let entries: Vec<_> = (1..=5)
        .map(|seq| LogEntry {
            seq,
            at_ms: seq,
            event: LogEvent::service(format!("line {seq}")),
        })
        .collect();
    assert!(jobs.append(&lease, &entries).await.unwrap());
    assert_eq!(jobs.log(id, 0, 2).await.unwrap(), entries[..2]);
    assert_eq!(jobs.log(id, 2, 100).await.unwrap(), entries[2..]);
    assert_eq!(jobs.last_seq(id).await.unwrap(), 5);
    assert_eq!(jobs.prune(1000).await.unwrap(), 0);
    jobs.finish(&lease, &Ending::Cancelled, 999).await.unwrap();
    assert_eq!(jobs.prune(999).await.unwrap(), 0);
    assert_eq!(jobs.prune(1000).await.unwrap(), 1);
    assert_eq!(jobs.get(id).await.unwrap(), None);
    assert_eq!(jobs.last_seq(id).await.unwrap(), 0);
}

#[tokio::test]
async fn lists_go_backwards_in_pages() {
    let (_dir, jobs) = open().await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.insert(0, accept(&jobs, &format!("d{n}"), "o/a").await);
    }
    let page = |jobs: Vec<Job>| jobs.into_iter().map(|job| job.id).collect::<Vec<_>>();
    assert_eq!(page(jobs.list(None, 2).await.unwrap()), ids[..2]);
    assert_eq!(page(jobs.list(Some(ids[1]), 9).await.unwrap()), ids[2..]);
}

/// Two services on one database, eight workers: every job is run exactly once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_job_is_claimed_twice() {
    const JOBS: usize = 60;
    let (dir, first) = open().await;
    let second = Jobs::open(&dir.path().join("jobs ü%20.sqlite"))
        .await
        .unwrap();
    for n in 0..JOBS {
        accept(&first, &format!("d{n}"), &format!("o/{n}")).await;
    }
    let mut workers = tokio::task::JoinSet::new();
    for n in 0..8 {
        let jobs = if n % 2 == 0 { &first } else { &second }.clone();
        workers.spawn(async move {
            let mut mine = Vec::new();
            while let Some(lease) = jobs.claim("w", LEASE, 3, 1).await.unwrap() {
                assert_eq!(lease.fence, 1);
                mine.push(lease.job.id);
                assert!(jobs.finish(&lease, &Ending::Cancelled, 2).await.unwrap());
            }
            mine
        });
    }
    let all = workers.join_all().await.concat();
    assert_eq!(all.len(), JOBS);
    assert_eq!(all.into_iter().collect::<BTreeSet<_>>().len(), JOBS);
}

#[tokio::test]
async fn a_directory_that_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/jobs.sqlite");
    let error = Jobs::open(&path).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("opening the job database {}", path.display())
    );
}

#[test]
fn only_canonical_names_are_jobs() {
    let id = JobId::new();
    assert_eq!(JobId::parse(&id.to_string()), Some(id));
    for bad in [
        "",
        "1",
        &id.to_string().to_uppercase(),
        &format!("{{{id}}}"),
    ] {
        assert_eq!(JobId::parse(bad), None, "{bad}");
    }
}

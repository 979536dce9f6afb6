//! Accepts connections and serves them, in bounded number and with time limits.
//!
//! `axum::serve` does neither: a client that sends its header byte by byte would
//! hold its connection for ever.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a request's header may take, and how long an unused connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(20);

/// The largest request header, in bytes. GitHub's have less than 2 KiB.
const HEADER_LIMIT: usize = 64 * 1024;

/// How long to wait after a failed accept; most often it is for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long requests may go on after `stop`. Streams of logs end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Serves `router` on at most `limit` connections at a time until `stop`, and then
/// until the requests under way are answered, but not for ever.
pub(crate) async fn run(
    listener: TcpListener,
    router: Router,
    limit: usize,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limit));
    let connections = TaskTracker::new();
    loop {
        let accepted = async {
            let permit = permits.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !is_the_clients(&error) {
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        let connection = serve(stream, router.clone(), stop.clone());
        connections.spawn(async move {
            connection.await;
            drop(permit);
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(GRACE, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = connections.len(),
            "connections were still busy and are cut"
        );
    }
}

async fn serve(stream: TcpStream, router: Router, stop: CancellationToken) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_LIMIT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // Broken off, too slow, or not HTTP: nothing that the operator could mend.
        tracing::debug!(%error, "a connection failed");
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

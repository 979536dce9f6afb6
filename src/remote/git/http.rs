//! Git's smart protocol in HTTP requests, with the crate's own HTTP client.
//!
//! <https://git-scm.com/docs/gitprotocol-http>

use std::io::{self, BufRead, Read};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{RequestBuilder, Response};
use tokio::runtime::Runtime;
use url::Url;

use super::error::GitError;
use super::watch::Watch;
use crate::registry::Reach;
use crate::secret::RedactedUrl;

/// How often the first request is sent on.
const REDIRECT_LIMIT: usize = 5;
/// What every first request ends with, so that a redirect shows where the others go.
const INFO_REFS: &str = "/info/refs";

/// An `Authorization` header, and the repositories that it is shown to.
#[derive(Clone)]
pub(super) struct Authorization {
    /// The remote, or what all remotes that may see it begin with.
    pub(super) scope: Url,
    /// The header.
    pub(super) header: HeaderValue,
}

impl Authorization {
    /// As git's `http.<url>.extraHeader`: same origin, and a path below the scope's.
    fn covers(&self, url: &Url) -> bool {
        let scope = self.scope.path().trim_end_matches('/');
        same_origin(&self.scope, url)
            && url
                .path()
                .strip_prefix(scope)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host() == b.host()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// A repository behind HTTP.
pub(super) struct Http<'o> {
    client: &'o reqwest::Client,
    runtime: &'o Runtime,
    watch: &'o Watch,
    idle: Duration,
    authorization: Option<Authorization>,
    reach: Reach,
    /// As the user gave it, user information included.
    given: Url,
    /// Where requests go: that, or where its server redirects to.
    base: Url,
    /// For messages.
    remote: String,
    body: Body<'o>,
}

impl<'o> Http<'o> {
    pub(super) fn new(
        client: &'o reqwest::Client,
        runtime: &'o Runtime,
        watch: &'o Watch,
        idle: Duration,
        authorization: Option<Authorization>,
        reach: Reach,
        url: &Url,
    ) -> Self {
        let mut base = url.clone();
        base.set_query(None);
        base.set_fragment(None);
        let path = base.path().trim_end_matches('/').to_owned();
        base.set_path(&path);
        Self {
            client,
            runtime,
            watch,
            idle,
            authorization,
            reach,
            remote: RedactedUrl(url).to_string(),
            given: base.clone(),
            base,
            body: Body {
                runtime,
                watch,
                idle,
                response: None,
                chunk: Bytes::new(),
            },
        }
    }

    /// Asks for the capabilities, and in older protocols the references; the answer is then read
    /// with [`Self::reader`].
    ///
    /// # Errors
    /// Those of [`Self::send`], and where the server does not speak git's smart protocol.
    pub(super) fn greet(&mut self) -> Result<(), GitError> {
        let mut url = below(&self.base, INFO_REFS);
        url.set_query(Some("service=git-upload-pack"));
        let mut redirects = 0;
        let response = loop {
            let request = self.client.get(self.with_user(&url));
            let request = self.authorized(request, &url);
            let response = self.execute(request.header("Git-Protocol", "version=2"), &url)?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                break response;
            }
            redirects += 1;
            url = self.redirected(&url, &response, redirects)?;
        };
        let response = self.judged(response, &url)?;
        let content_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        if content_type.split(';').next().map(str::trim)
            != Some("application/x-git-upload-pack-advertisement")
        {
            return Err(GitError::Protocol {
                remote: self.remote.clone(),
                reason: format!(
                    "that is no repository of a git server: it answers with the content type \
                     {content_type:?}; repositories that are plain files behind a web server \
                     (\"dumb HTTP\") are not supported"
                ),
            });
        }
        let path = url.path();
        let path = path.strip_suffix(INFO_REFS).unwrap_or(path).to_owned();
        url.set_path(&path);
        url.set_query(None);
        self.base = url;
        self.body.response = Some(response);
        self.body.chunk = Bytes::new();
        Ok(())
    }

    /// Sends a request to the upload service; the answer is then read with [`Self::reader`].
    ///
    /// # Errors
    /// [`GitError::Connection`], [`GitError::Authentication`], [`GitError::Status`],
    /// [`GitError::Redirect`], [`GitError::Cancelled`], [`GitError::Timeout`].
    pub(super) fn send(&mut self, body: Vec<u8>) -> Result<(), GitError> {
        let url = below(&self.base, "/git-upload-pack");
        let request = self
            .client
            .post(self.with_user(&url))
            .header("Git-Protocol", "version=2")
            .header(CONTENT_TYPE, "application/x-git-upload-pack-request")
            .header("Accept", "application/x-git-upload-pack-result")
            .body(body);
        let request = self.authorized(request, &url);
        let response = self.execute(request, &url)?;
        let response = self.judged(response, &url)?;
        self.body.response = Some(response);
        self.body.chunk = Bytes::new();
        Ok(())
    }

    pub(super) fn reader(&mut self) -> &mut dyn Read {
        &mut self.body
    }

    /// User information is shown to the server that it was given for; the client makes basic
    /// authentication of it.
    fn with_user(&self, url: &Url) -> Url {
        let mut url = url.clone();
        let ours = same_origin(&self.given, &url) && self.header_for(&url).is_none();
        let (user, password) = if ours {
            (self.given.username(), self.given.password())
        } else {
            ("", None)
        };
        // Both fail only for URLs without a host, of which this is none.
        let _ = url.set_username(user);
        let _ = url.set_password(password);
        url
    }

    fn header_for(&self, url: &Url) -> Option<&HeaderValue> {
        let authorization = self.authorization.as_ref()?;
        // Only what is below the repository itself, wherever the server redirects to.
        let wanted = authorization.covers(&self.given) && same_origin(&self.given, url);
        wanted.then_some(&authorization.header)
    }

    fn authorized(&self, request: RequestBuilder, url: &Url) -> RequestBuilder {
        match self.header_for(url) {
            Some(header) => request.header(AUTHORIZATION, header.clone()),
            None => request,
        }
    }

    fn execute(&self, request: RequestBuilder, url: &Url) -> Result<Response, GitError> {
        self.watch.check(&self.remote)?;
        self.reach
            .check(url)
            .map_err(|reason| GitError::Connection {
                remote: self.remote.clone(),
                reason: reason.to_owned(),
            })?;
        let answer = self.runtime.block_on(async {
            tokio::select! {
                answer = tokio::time::timeout(self.idle, request.send()) => Some(answer),
                () = self.watch.over() => None,
            }
        });
        let fail = |reason: String| GitError::Connection {
            remote: self.remote.clone(),
            reason,
        };
        match answer {
            None => {
                self.watch.check(&self.remote)?;
                Err(fail("stopped".to_owned()))
            }
            Some(Err(_)) => Err(fail(format!("no answer within {:?}", self.idle))),
            Some(Ok(Err(error))) => Err(fail(chain(&error.without_url()))),
            // A client that follows redirects itself would carry credentials elsewhere.
            Some(Ok(Ok(response))) if !same_origin(response.url(), url) => Err(fail(
                "the HTTP client follows redirects by itself".to_owned(),
            )),
            Some(Ok(Ok(response))) => Ok(response),
        }
    }

    fn redirected(
        &self,
        from: &Url,
        response: &Response,
        redirects: usize,
    ) -> Result<Url, GitError> {
        let location = response.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let next = location.and_then(|location| from.join(location).ok());
        let fail = |reason| GitError::Redirect {
            remote: self.remote.clone(),
            location: next
                .as_ref()
                .map_or_else(|| "nowhere".to_owned(), |url| RedactedUrl(url).to_string()),
            reason,
        };
        let Some(url) = &next else {
            return Err(fail("the answer has no location that is a URL"));
        };
        if redirects > REDIRECT_LIMIT {
            return Err(fail("too many redirects"));
        }
        may_follow(from, url).map_err(fail)?;
        let mut url = url.clone();
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_fragment(None);
        Ok(url)
    }

    fn judged(&self, response: Response, url: &Url) -> Result<Response, GitError> {
        let status = response.status();
        let hint = match status.as_u16() {
            200 => return Ok(response),
            401 | 403 => {
                let host = self.given.host_str().unwrap_or_default();
                let port = self.given.port();
                return Err(GitError::Authentication {
                    remote: self.remote.clone(),
                    status: format!("the server answered {status}"),
                    host: port.map_or_else(|| host.to_owned(), |port| format!("{host}:{port}")),
                    shown: self.header_for(url).is_some()
                        || !self.with_user(url).username().is_empty(),
                });
            }
            300..=399 => {
                return Err(GitError::Redirect {
                    remote: self.remote.clone(),
                    location: "another place".to_owned(),
                    reason: "only the first request may be redirected",
                });
            }
            404 => {
                ": there is no such repository, or it is private and needs the secret \
                 GIT_AUTH_TOKEN"
            }
            429 => ": it was asked too often",
            _ => "",
        };
        Err(GitError::Status {
            remote: self.remote.clone(),
            status: status.as_u16(),
            hint,
        })
    }
}

/// Whether the first request may go from one place to another.
fn may_follow(from: &Url, to: &Url) -> Result<(), &'static str> {
    match (from.scheme(), to.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err("it leads from https to http"),
        _ => return Err("its scheme is not https"),
    }
    if !to.path().ends_with(INFO_REFS) || to.query() != Some("service=git-upload-pack") {
        return Err("it leads to something that is no git repository");
    }
    Ok(())
}

fn below(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}{path}", base.path().trim_end_matches('/')));
    url
}

fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// An answer's body.
struct Body<'o> {
    runtime: &'o Runtime,
    watch: &'o Watch,
    idle: Duration,
    response: Option<Response>,
    chunk: Bytes,
}

impl BufRead for Body<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.chunk.is_empty() {
            let Some(response) = &mut self.response else {
                break;
            };
            let next = self.runtime.block_on(async {
                tokio::select! {
                    next = tokio::time::timeout(self.idle, response.chunk()) => Some(next),
                    () = self.watch.over() => None,
                }
            });
            match next {
                None => return Err(io::Error::other("stopped")),
                Some(Err(_)) => {
                    let reason = format!("nothing came for {:?}", self.idle);
                    return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
                }
                Some(Ok(Err(error))) => return Err(io::Error::other(chain(&error.without_url()))),
                Some(Ok(Ok(None))) => self.response = None,
                Some(Ok(Ok(Some(chunk)))) => self.chunk = chunk,
            }
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, amount: usize) {
        let _ = self.chunk.split_to(amount.min(self.chunk.len()));
    }
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_s05_an_authorization_is_for_its_repository() {
        let url = |text: &str| Url::parse(text).unwrap();
        let authorization = Authorization {
            scope: url("https://h/a/b.git"),
            header: HeaderValue::from_static("x"),
        };
        let check = |text: &str, expected: bool| {
            assert_eq!(authorization.covers(&url(text)), expected, "{text}");
        };
        check("https://h/a/b.git", true);
        check("https://h:443/a/b.git/c", true);
        check("https://h/a/b.gitx", false);
        check("https://h/a/c.git", false);
        check("http://h/a/b.git", false);
        check("https://h:444/a/b.git", false);
        check("https://x/a/b.git", false);
        let all = Authorization {
            scope: url("https://github.com/"),
            header: HeaderValue::from_static("x"),
        };
        assert!(all.covers(&url("https://github.com/a/b")));
        assert!(!all.covers(&url("https://github.com.evil/a/b")));
    }

    #[test]
    fn security_s15_redirects_lead_to_nothing_weaker() {
        let check = |from: &str, to: &str, expected: Option<&str>| {
            let url = |base: &str, tail: &str| Url::parse(&format!("{base}{tail}")).unwrap();
            let tail = "/info/refs?service=git-upload-pack";
            let got = may_follow(&url(from, tail), &url(to, tail));
            assert_eq!(got.err(), expected, "{from} {to}");
        };
        check("https://h/a.git", "https://x/b.git", None);
        check("http://h/a.git", "https://x/b.git", None);
        check("http://h/a.git", "http://x/b.git", None);
        let weaker = Some("it leads from https to http");
        check("https://h/a.git", "http://h/a.git", weaker);
        let scheme = Some("its scheme is not https");
        check("https://h/a.git", "ftp://h/a.git", scheme);
        check("http://h/a.git", "file:///a.git", scheme);
        let other = Some("it leads to something that is no git repository");
        check("https://h/a.git", "https://h/login?next=", other);
        check("https://h/a.git", "https://h/a.git/info/refs?x=", other);
    }
}

//! One request to a registry, from address to judged answer: which scheme, which
//! authorization, which redirects, which retries.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::header::{AUTHORIZATION, HeaderMap, LOCATION};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::OnceCell;
use url::Url;

use super::RegistryError;
use super::address::{Endpoint, Scheme, may_follow, same_origin};
use super::auth::{Authenticator, Scopes};
use super::error::{StatusError, clean, request_label};
use super::http::{Http, Patience};
use super::lock;
use crate::secret::RedactedUrl;

/// How often a request is sent on. One is usual, to a content delivery network.
const REDIRECT_LIMIT: usize = 5;
/// How much of an error's body is read, in bytes.
const ERROR_LIMIT_BYTES: u64 = 64 << 10;

/// Makes a body that cannot be kept, anew for each attempt.
pub(super) type BodySource =
    Arc<dyn Fn() -> BoxFuture<'static, Result<reqwest::Body, RegistryError>> + Send + Sync>;

/// What is sent.
pub(super) enum Payload {
    /// Nothing.
    Empty,
    /// Few bytes.
    Bytes(Bytes),
    /// Many. The caller sets `Content-Length` and watches over the time.
    Stream(BodySource),
}

/// A request.
pub(super) struct Call<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) scopes: &'a Scopes,
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) payload: Payload,
    /// Statuses beside 2xx that are an answer and no error.
    pub(super) accept: &'static [StatusCode],
    /// How long until the answer begins; absent for a stream.
    pub(super) limit: Option<Duration>,
}

/// An answer whose status was wanted.
#[derive(Debug)]
pub(super) struct Answer {
    response: Response,
    method: Method,
    /// Where it came from in the end.
    pub(super) url: Url,
    idle: Duration,
}

/// Sends requests.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) http: Http,
    authenticator: Authenticator,
    /// By authority: how an insecure registry is spoken to, once known.
    schemes: Mutex<HashMap<String, Arc<OnceCell<&'static str>>>>,
}

impl Transport {
    pub(super) fn new(http: Http, authenticator: Authenticator) -> Self {
        Self {
            http,
            authenticator,
            schemes: Mutex::default(),
        }
    }

    /// Who answers challenges.
    pub(super) fn authenticator(&self) -> &Authenticator {
        &self.authenticator
    }

    /// A call for `path` below the endpoint's repository, such as `manifests/latest`.
    ///
    /// # Errors
    /// Those of finding out the scheme of an insecure registry.
    pub(super) async fn call<'a>(
        &self,
        endpoint: &'a Endpoint,
        scopes: &'a Scopes,
        method: Method,
        path: &str,
    ) -> Result<Call<'a>, RegistryError> {
        let mut url = self.origin(endpoint).await?;
        url.set_path(&format!("/v2/{}/{path}", endpoint.name));
        Ok(self.call_url(endpoint, scopes, method, url))
    }

    /// A call for a URL that the registry named and [`Self::follow`] allowed.
    pub(super) fn call_url<'a>(
        &self,
        endpoint: &'a Endpoint,
        scopes: &'a Scopes,
        method: Method,
        url: Url,
    ) -> Call<'a> {
        Call {
            endpoint,
            scopes,
            method,
            url,
            headers: HeaderMap::new(),
            payload: Payload::Empty,
            accept: &[],
            limit: Some(self.http.timing.answer),
        }
    }

    /// Sends `call`, again and again while the failure is temporary and the patience lasts.
    pub(super) async fn send(&self, call: &Call<'_>) -> Result<Answer, RegistryError> {
        self.send_with(call, &mut self.http.patience()).await
    }

    /// As [`Self::send`] with a budget that several requests share.
    pub(super) async fn send_with(
        &self,
        call: &Call<'_>,
        patience: &mut Patience,
    ) -> Result<Answer, RegistryError> {
        loop {
            match self.send_once(call).await {
                Err(error) if patience.wait(&error).await => {}
                result => return result,
            }
        }
    }

    /// Sends `call` once, which includes answering a challenge and following redirects.
    pub(super) async fn send_once(&self, call: &Call<'_>) -> Result<Answer, RegistryError> {
        let origin = self.origin(call.endpoint).await?;
        let mut url = call.url.clone();
        let mut challenged = false;
        let mut redirects = 0;
        let mut ours = true;
        loop {
            // Elsewhere the request goes without credentials, and nobody else's challenge is
            // answered. It stays so: who sends a request back must not choose what it does.
            ours = ours && same_origin(&origin, &url);
            let shown = if ours {
                self.authenticator
                    .authorization(&self.http, call.endpoint, &origin, call.scopes)
                    .await?
            } else {
                None
            };
            let mut request = self
                .http
                .request(&call.method, &url)
                .headers(call.headers.clone());
            if let Some(shown) = &shown {
                request = request.header(AUTHORIZATION, shown.clone());
            }
            request = match &call.payload {
                Payload::Empty => request,
                Payload::Bytes(bytes) => request.body(bytes.clone()),
                Payload::Stream(source) => request.body(source().await?),
            };
            let response = self
                .http
                .execute(request, &call.method, &url, call.limit)
                .await?;
            let status = response.status();
            if status.is_success() || call.accept.contains(&status) {
                return Ok(Answer {
                    response,
                    method: call.method.clone(),
                    url,
                    idle: self.http.timing.idle,
                });
            }
            let headers = response.headers().clone();
            // Read also where it is not needed, so that the connection can be used again.
            let body = read_body(
                response,
                &call.method,
                &url,
                self.http.timing.idle,
                ERROR_LIMIT_BYTES,
            )
            .await
            .ok()
            .flatten()
            .unwrap_or_default();
            if status == StatusCode::UNAUTHORIZED && ours && !challenged {
                challenged = true;
                let again = self
                    .authenticator
                    .challenged(
                        &self.http,
                        call.endpoint,
                        &origin,
                        call.scopes,
                        &headers,
                        shown.as_ref(),
                    )
                    .await?;
                if again {
                    continue;
                }
            }
            if is_redirect(status, &call.method)
                && let Some(next) = location(&headers)
            {
                redirects += 1;
                let next = if redirects > REDIRECT_LIMIT {
                    Err(RegistryError::Location {
                        request: request_label(&call.method, &call.url),
                        location: clean(&redacted(&url, next)),
                        reason: "too many redirects",
                    })
                } else {
                    self.follow(&origin, &call.method, &url, next)
                };
                url = next?;
                continue;
            }
            let error = StatusError::new(&call.method, &url, status, &headers, &body);
            let hint = match status.as_u16() {
                401 | 403 if ours => {
                    self.authenticator
                        .advice(call.endpoint, &origin, call.scopes)
                        .await
                }
                404 if error.has_code("NAME_UNKNOWN") && call.method == Method::POST => Some(
                    "at some registries a repository must be created before it is pushed to"
                        .to_owned(),
                ),
                413 => Some(
                    "the registry, or a proxy before it, limits the size of uploads".to_owned(),
                ),
                429 => Some(
                    "the registry limits how often it is asked; \
                     logged-in users often may more, and a --registry-mirror helps"
                        .to_owned(),
                ),
                _ => None,
            };
            return Err(RegistryError::from(error).with_hint(hint));
        }
    }

    /// Resolves a location that came as the answer to `method` on `base`, and checks it.
    ///
    /// # Errors
    /// [`RegistryError::Location`] where no request may go there.
    pub(super) fn follow(
        &self,
        origin: &Url,
        method: &Method,
        base: &Url,
        location: &str,
    ) -> Result<Url, RegistryError> {
        let fail = |reason| RegistryError::Location {
            request: request_label(method, base),
            location: clean(&redacted(base, location)),
            reason,
        };
        let mut url = base.join(location).map_err(|_| fail("that is not a URL"))?;
        // A user name in a URL would become a second `Authorization`.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_fragment(None);
        may_follow(origin, &url, self.http.insecure()).map_err(fail)?;
        Ok(url)
    }

    /// `SCHEME://HOST[:PORT]/` of an endpoint.
    ///
    /// # Errors
    /// [`RegistryError::Address`]; for an insecure registry those of the first request to it.
    pub(super) async fn origin(&self, endpoint: &Endpoint) -> Result<Url, RegistryError> {
        let scheme = match endpoint.scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
            Scheme::Either => {
                let cell = lock(&self.schemes)
                    .entry(endpoint.authority.clone())
                    .or_default()
                    .clone();
                *cell.get_or_try_init(|| self.probe(endpoint)).await?
            }
        };
        endpoint.base(scheme)
    }

    /// Whether an insecure registry speaks TLS.
    async fn probe(&self, endpoint: &Endpoint) -> Result<&'static str, RegistryError> {
        let mut patience = self.http.patience();
        loop {
            let secure = self.touch(endpoint, "https").await;
            let Err(error) = secure else {
                return Ok("https");
            };
            if self.touch(endpoint, "http").await.is_ok() {
                tracing::warn!(
                    registry = endpoint.authority,
                    "speaking plain HTTP to an insecure registry"
                );
                return Ok("http");
            }
            if !patience.wait(&error).await {
                return Err(error);
            }
        }
    }

    /// Any answer will do.
    async fn touch(&self, endpoint: &Endpoint, scheme: &str) -> Result<(), RegistryError> {
        let mut url = endpoint.base(scheme)?;
        url.set_path("/v2/");
        let request = self.http.request(&Method::GET, &url);
        let limit = Some(self.http.timing.answer);
        let response = self
            .http
            .execute(request, &Method::GET, &url, limit)
            .await?;
        // Go's server answers a plain request to its TLS port with this, in plain text.
        if scheme == "http" && response.status() == StatusCode::BAD_REQUEST {
            return Err(StatusError::new(
                &Method::GET,
                &url,
                response.status(),
                response.headers(),
                &[],
            )
            .into());
        }
        Ok(())
    }
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// A header's text; absent also where it is not ASCII.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    pub(super) fn method(&self) -> &Method {
        &self.method
    }

    /// The number of bytes that follow, where the registry says.
    pub(super) fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// Method and redacted URL.
    pub(super) fn label(&self) -> String {
        request_label(&self.method, &self.url)
    }

    /// The next piece of the body.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        next_chunk(&mut self.response, &self.method, &self.url, self.idle).await
    }

    /// The whole body; absent where it is larger than `limit_bytes`.
    pub(super) async fn body(self, limit_bytes: u64) -> Result<Option<Vec<u8>>, RegistryError> {
        read_body(
            self.response,
            &self.method,
            &self.url,
            self.idle,
            limit_bytes,
        )
        .await
    }
}

pub(crate) async fn next_chunk(
    response: &mut Response,
    method: &Method,
    url: &Url,
    idle: Duration,
) -> Result<Option<Bytes>, RegistryError> {
    tokio::time::timeout(idle, response.chunk())
        .await
        .map_err(|_| RegistryError::Timeout {
            request: request_label(method, url),
            waiting_for: "reading the answer",
            waited: idle,
        })?
        .map_err(|error| RegistryError::connection(method, url, error))
}

/// Reads a body of at most `limit_bytes`; absent where there is more.
pub(super) async fn read_body(
    mut response: Response,
    method: &Method,
    url: &Url,
    idle: Duration,
    limit_bytes: u64,
) -> Result<Option<Vec<u8>>, RegistryError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = next_chunk(&mut response, method, url, idle).await? {
        if (bytes.len() + chunk.len()) as u64 > limit_bytes {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}

/// Whether to send the same request on. Where the method would have to change,
/// a registry means something that this client does not know.
fn is_redirect(status: StatusCode, method: &Method) -> bool {
    match status.as_u16() {
        307 | 308 => true,
        301..=303 => matches!(*method, Method::GET | Method::HEAD),
        _ => false,
    }
}

/// The `Location`, which only a server that wants to be misunderstood gives twice.
fn location(headers: &HeaderMap) -> Option<&str> {
    headers.get(LOCATION)?.to_str().ok()
}

fn redacted(base: &Url, location: &str) -> String {
    match base.join(location) {
        Ok(url) => RedactedUrl(&url).to_string(),
        Err(_) => "something that is not a URL".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_keeps_its_method_is_redirected() {
        for (status, get, put) in [
            (301, true, false),
            (302, true, false),
            (303, true, false),
            (304, false, false),
            (307, true, true),
            (308, true, true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(is_redirect(status, &Method::GET), get, "{status}");
            assert_eq!(is_redirect(status, &Method::PUT), put, "{status}");
        }
    }

    #[test]
    fn a_location_is_shown_without_its_secrets() {
        let base = Url::parse("https://r.io/v2/").unwrap();
        for (location, expected) in [
            ("/x?state=1", "https://r.io/x?…"),
            ("https://u:p@h/y#f", "https://h/y"),
            ("https://[", "something that is not a URL"),
        ] {
            assert_eq!(redacted(&base, location), expected);
        }
    }
}

//! Challenges answered: which `Authorization` a request to a registry gets.
//!
//! Nothing is asked ahead: a request goes out as the last answer of that registry
//! taught, and a challenge (401) teaches. So a registry without authentication costs
//! no request, and one with tokens costs one per set of scopes and lifetime.
//!
//! <https://distribution.github.io/distribution/spec/auth/token/>,
//! <https://distribution.github.io/distribution/spec/auth/oauth/>

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Response};
use serde::Deserialize;
use url::Url;

use super::address::{Endpoint, may_be_realm};
use super::credentials::{Credential, CredentialFiles, Lookup};
use super::error::{RegistryError, StatusError, authority, request_label};
use super::http::Http;
use super::lock;
use crate::secret::{RedactedUrl, Secret};

/// The name under which tokens are asked for.
const CLIENT_ID: &str = "sockless";
/// The largest answer of a token server that is read, in bytes. Tokens of clouds have some KiB.
const TOKEN_LIMIT_BYTES: u64 = 1 << 20;
/// A token's lifetime where its server does not say, from the specification.
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// The longest `WWW-Authenticate` that is read; longer ones are no challenge.
const CHALLENGE_LIMIT_BYTES: usize = 16 << 10;

/// What a request needs to be allowed to do, sorted: `repository:NAME:pull,push`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scopes(BTreeSet<String>);

impl Scopes {
    /// For nothing but to be known.
    pub(super) fn none() -> Self {
        Self(BTreeSet::new())
    }

    /// To read from `repository`.
    pub(super) fn pull(repository: &str) -> Self {
        Self([format!("repository:{repository}:pull")].into())
    }

    /// To write to `repository`.
    pub(super) fn push(repository: &str) -> Self {
        Self([format!("repository:{repository}:pull,push")].into())
    }

    /// To write to `repository` and read from `from`.
    pub(super) fn mount(repository: &str, from: &str) -> Self {
        let mut scopes = Self::push(repository);
        scopes.0.insert(format!("repository:{from}:pull"));
        scopes
    }
}

/// What a registry wants, reduced to what is understood here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Knows what registries want and holds what was obtained.
pub(super) struct Authenticator {
    files: CredentialFiles,
    /// What each origin (`SCHEME://HOST[:PORT]/`) asked for last.
    challenges: Mutex<HashMap<String, Challenge>>,
    /// What each origin is shown. The inner lock is held while a token is fetched,
    /// so that requests side by side fetch it once.
    slots: Mutex<HashMap<(String, Scopes), SharedSlot>>,
}

type SharedSlot = Arc<tokio::sync::Mutex<Slot>>;

#[derive(Default)]
struct Slot {
    authorization: Option<Authorization>,
    /// How the look-up of credentials went, for the hint of a refusal.
    places: Option<(bool, String)>,
}

struct Authorization {
    header: HeaderValue,
    expires: Option<Instant>,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Looks for credentials in `files`.
    pub(super) fn new(files: CredentialFiles) -> Self {
        Self {
            files,
            challenges: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// Where credentials are looked for.
    pub(super) fn files(&self) -> &CredentialFiles {
        &self.files
    }

    /// What to show `origin` with the next request, as far as is known.
    ///
    /// # Errors
    /// Those of obtaining a new token where the origin is known to want one.
    pub(super) async fn authorization(
        &self,
        http: &Http,
        endpoint: &Endpoint,
        origin: &Url,
        scopes: &Scopes,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(origin, scopes);
        let mut slot = slot.lock().await;
        if let Some(known) = &slot.authorization
            && known.expires.is_none_or(|at| Instant::now() < at)
        {
            return Ok(Some(known.header.clone()));
        }
        let challenge = lock(&self.challenges).get(origin.as_str()).cloned();
        let Some(mut challenge) = challenge else {
            return Ok(None);
        };
        if let Challenge::Bearer { scope, .. } = &mut challenge {
            // It belonged to the request that was challenged.
            *scope = None;
        }
        self.obtain(http, endpoint, origin, scopes, &challenge, &mut slot)
            .await
    }

    /// Takes the challenge of a 401 from `origin` to a request that had shown `shown`.
    ///
    /// Says whether there is now something else to show.
    ///
    /// # Errors
    /// Those of obtaining a token.
    pub(super) async fn challenged(
        &self,
        http: &Http,
        endpoint: &Endpoint,
        origin: &Url,
        scopes: &Scopes,
        headers: &HeaderMap,
        shown: Option<&HeaderValue>,
    ) -> Result<bool, RegistryError> {
        let slot = self.slot(origin, scopes);
        let mut slot = slot.lock().await;
        if let Some(known) = &slot.authorization
            && Some(&known.header) != shown
        {
            // A request beside this one was faster.
            return Ok(true);
        }
        slot.authorization = None;
        let Some(challenge) = choose(headers) else {
            return Ok(false);
        };
        lock(&self.challenges).insert(origin.to_string(), challenge.clone());
        let obtained = self
            .obtain(http, endpoint, origin, scopes, &challenge, &mut slot)
            .await?;
        Ok(obtained.is_some_and(|header| Some(&header) != shown))
    }

    /// Advice for a request that was refused in the end.
    pub(super) async fn advice(
        &self,
        endpoint: &Endpoint,
        origin: &Url,
        scopes: &Scopes,
    ) -> Option<String> {
        let slot = self.slot(origin, scopes);
        let slot = slot.lock().await;
        let (found, places) = slot.places.as_ref()?;
        Some(refusal_hint(&endpoint.registry, *found, places))
    }

    fn slot(&self, origin: &Url, scopes: &Scopes) -> SharedSlot {
        lock(&self.slots)
            .entry((origin.to_string(), scopes.clone()))
            .or_default()
            .clone()
    }

    async fn obtain(
        &self,
        http: &Http,
        endpoint: &Endpoint,
        origin: &Url,
        scopes: &Scopes,
        challenge: &Challenge,
        slot: &mut Slot,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        // Before the look-up: an unfit realm must not even start a helper.
        let realm = match challenge {
            Challenge::Basic => None,
            Challenge::Bearer { realm, .. } => Some(check_realm(http, origin, realm)?),
        };
        let lookup = self
            .files
            .look_up(&endpoint.registry, &endpoint.name)
            .await?;
        slot.places = Some((lookup.credential.is_some(), lookup.places.clone()));
        let authorization = match (&lookup.credential, challenge, realm) {
            (Some(Credential::RegistryToken(token)), ..) => Some((bearer(token.expose()), None)),
            (Some(Credential::Password { username, password }), Challenge::Basic, _) => {
                Some((Some(basic(username, password)), None))
            }
            (_, Challenge::Bearer { service, scope, .. }, Some(realm)) => {
                let mut wanted = scopes.0.clone();
                wanted.extend(scope.iter().flat_map(|s| s.split(' ')).map(str::to_owned));
                let request = TokenRequest {
                    endpoint,
                    realm: &realm,
                    service: service.as_deref(),
                    scopes: &wanted,
                    lookup: &lookup,
                };
                let token = request.send(http).await?;
                let lifetime = token.expires_in.map_or(TOKEN_LIFETIME, Duration::from_secs);
                // A tenth early, for clocks and for the way.
                let expires = Instant::now().checked_add(lifetime / 10 * 9);
                Some((bearer(token.text.expose()), expires))
            }
            _ => None,
        };
        let Some((header, expires)) = authorization else {
            return Ok(None);
        };
        let header = header.ok_or_else(|| RegistryError::Credentials {
            registry: endpoint.registry.clone(),
            from: lookup.places,
            reason: "the token has characters that cannot be sent".to_owned(),
        })?;
        slot.authorization = Some(Authorization {
            header: header.clone(),
            expires,
        });
        Ok(Some(header))
    }
}

fn refusal_hint(registry: &str, found: bool, places: &str) -> String {
    if found {
        format!("the credentials for {registry} from {places} do not allow this")
    } else {
        format!(
            "no credentials for {registry} were found; looked in {places}; \
             `docker login {registry}` puts them there"
        )
    }
}

fn check_realm(http: &Http, origin: &Url, realm: &str) -> Result<Url, RegistryError> {
    let fail = |realm: String, reason| RegistryError::Realm {
        registry: authority(origin),
        realm,
        reason,
    };
    let url = Url::parse(realm)
        .map_err(|_| fail(super::error::clean(realm), "that is not an absolute URL"))?;
    may_be_realm(origin, &url, http.insecure())
        .map_err(|reason| fail(RedactedUrl(&url).to_string(), reason))?;
    Ok(url)
}

/// One exchange with a token server.
struct TokenRequest<'a> {
    endpoint: &'a Endpoint,
    realm: &'a Url,
    service: Option<&'a str>,
    scopes: &'a BTreeSet<String>,
    lookup: &'a Lookup,
}

struct Token {
    text: Secret,
    expires_in: Option<u64>,
}

impl TokenRequest<'_> {
    async fn send(&self, http: &Http) -> Result<Token, RegistryError> {
        let mut patience = http.patience();
        loop {
            match self.send_once(http).await {
                Err(error) if patience.wait(&error).await => {}
                result => return result,
            }
        }
    }

    async fn send_once(&self, http: &Http) -> Result<Token, RegistryError> {
        let mut url = self.realm.clone();
        let method;
        let request = match &self.lookup.credential {
            Some(Credential::IdentityToken(token)) => {
                method = Method::POST;
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", CLIENT_ID)
                    .append_pair("refresh_token", token.expose());
                if let Some(service) = self.service {
                    form.append_pair("service", service);
                }
                let scopes: Vec<&str> = self.scopes.iter().map(String::as_str).collect();
                form.append_pair("scope", &scopes.join(" "));
                http.request(&method, &url)
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.finish())
            }
            other => {
                method = Method::GET;
                {
                    let mut query = url.query_pairs_mut();
                    if let Some(service) = self.service {
                        query.append_pair("service", service);
                    }
                    for scope in self.scopes {
                        query.append_pair("scope", scope);
                    }
                }
                let request = http.request(&method, &url);
                match other {
                    Some(Credential::Password { username, password }) => {
                        request.header(AUTHORIZATION, basic(username, password))
                    }
                    _ => request,
                }
            }
        };
        let limit = http.timing.answer;
        let response = http.execute(request, &method, &url, Some(limit)).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = read_limited(http, response, &method, &url).await?;
        if !status.is_success() {
            let error = StatusError::new(&method, &url, status, &headers, &body);
            let found = self.lookup.credential.is_some();
            let hint = matches!(status.as_u16(), 400 | 401 | 403)
                .then(|| refusal_hint(&self.endpoint.registry, found, &self.lookup.places));
            return Err(RegistryError::from(error).with_hint(hint));
        }
        parse_token(&body).map_err(|reason| RegistryError::Reply {
            request: request_label(&method, &url),
            reason: reason.to_owned(),
        })
    }
}

fn parse_token(body: &[u8]) -> Result<Token, &'static str> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<Secret>,
        access_token: Option<Secret>,
        expires_in: Option<u64>,
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|_| "the token server's answer is not valid JSON")?;
    let text = [answer.token, answer.access_token]
        .into_iter()
        .flatten()
        .find(|token| !token.expose().is_empty())
        .ok_or("the token server's answer has no token")?;
    Ok(Token {
        text,
        expires_in: answer.expires_in.filter(|seconds| *seconds > 0),
    })
}

async fn read_limited(
    http: &Http,
    response: Response,
    method: &Method,
    url: &Url,
) -> Result<Vec<u8>, RegistryError> {
    super::transport::read_body(response, method, url, http.timing.idle, TOKEN_LIMIT_BYTES)
        .await?
        .ok_or_else(|| RegistryError::TooLarge {
            what: format!("the answer of {}", RedactedUrl(url)),
            limit_bytes: TOKEN_LIMIT_BYTES,
        })
}

fn basic(username: &str, password: &Secret) -> HeaderValue {
    let pair = format!("{username}:{}", password.expose());
    let text = base64::engine::general_purpose::STANDARD.encode(pair);
    sensitive(&format!("Basic {text}")).expect("base64 is always a valid header value")
}

fn bearer(token: &str) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {token}"))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The name of what a registry asks for; absent where it is nothing that is understood here.
pub(super) fn wanted(headers: &HeaderMap) -> Option<&'static str> {
    choose(headers).map(|challenge| match challenge {
        Challenge::Basic => "basic",
        Challenge::Bearer { .. } => "bearer",
    })
}

/// The challenge that is answered: tokens rather than passwords.
fn choose(headers: &HeaderMap) -> Option<Challenge> {
    let all: Vec<Challenge> = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .filter(|text| text.len() <= CHALLENGE_LIMIT_BYTES)
        .flat_map(parse_challenges)
        .collect();
    let is_bearer = |challenge: &&Challenge| matches!(challenge, Challenge::Bearer { .. });
    all.iter().find(is_bearer).or(all.first()).cloned()
}

/// Reads a list of challenges; what is not understood is passed over.
///
/// <https://www.rfc-editor.org/rfc/rfc9110#section-11.6.1>
fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut rest = text;
    let mut found: Vec<(String, HashMap<String, String>)> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let word_end = rest.find(|c| !is_token(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(word_end);
        if word.is_empty() {
            break;
        }
        let value = after
            .trim_start_matches([' ', '\t'])
            .strip_prefix('=')
            .map(|value| value.trim_start_matches([' ', '\t']));
        match (value.and_then(parse_value), found.last_mut()) {
            (Some((value, after)), Some((_, parameters))) => {
                // The first of a repeated parameter counts, so that none can be overwritten.
                parameters.entry(word.to_ascii_lowercase()).or_insert(value);
                rest = after;
            }
            _ => {
                found.push((word.to_ascii_lowercase(), HashMap::new()));
                // What is left of a token68 such as Negotiate's.
                rest = after.trim_start_matches(['=', '/', '+']);
            }
        }
    }
    found
        .into_iter()
        .filter_map(|(scheme, mut parameters)| match scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer {
                realm: parameters.remove("realm")?,
                service: parameters.remove("service"),
                scope: parameters.remove("scope").filter(|s| !s.is_empty()),
            }),
            _ => None,
        })
        .collect()
}

/// A token or quoted string, and what follows it.
fn parse_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (!value.is_empty()).then(|| (value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            other => value.push(other),
        }
    }
    None
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[track_caller]
    fn check(text: &str, expected: &[Challenge]) {
        assert_eq!(parse_challenges(text), expected, "{text}");
    }

    #[test]
    fn challenges_are_read_in_every_form_of_the_grammar() {
        check(
            r#"Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push""#,
            &[token(
                "https://a/t",
                Some("s"),
                Some("repository:a/b:pull,push"),
            )],
        );
        check(
            r#"bearer Realm = "a\"b" , service=x"#,
            &[token("a\"b", Some("x"), None)],
        );
        check("Basic", &[Challenge::Basic]);
        check(r#"Basic realm="x, Bearer realm=y""#, &[Challenge::Basic]);
        check(
            r#"Negotiate abc/+==, Basic realm="x", Bearer realm="y""#,
            &[Challenge::Basic, token("y", None, None)],
        );
        check(r#"Digest qop="auth", nonce=1"#, &[]);
        check("Bearer service=x", &[]);
        check(r#"Bearer realm="unterminated"#, &[]);
        check(r#"Bearer realm="x\"#, &[]);
        check("", &[]);
        check("====,,,", &[]);
        check(
            r#"Bearer realm="first",realm="second""#,
            &[token("first", None, None)],
        );
    }

    #[test]
    fn tokens_are_preferred_to_passwords() {
        let mut headers = HeaderMap::new();
        assert_eq!(choose(&headers), None);
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=x"));
        assert_eq!(choose(&headers), Some(Challenge::Basic));
        headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=y"));
        assert_eq!(choose(&headers), Some(token("y", None, None)));
    }

    #[test]
    fn a_token_has_one_of_two_names() {
        let parse = |text: &str| {
            parse_token(text.as_bytes()).map(|t| (t.text.expose().to_owned(), t.expires_in))
        };
        assert_eq!(
            parse(r#"{"token":"a","access_token":"b","expires_in":300}"#),
            Ok(("a".to_owned(), Some(300)))
        );
        assert_eq!(
            parse(r#"{"access_token":"b","expires_in":0}"#),
            Ok(("b".to_owned(), None))
        );
        assert_eq!(
            parse(r#"{"token":""}"#),
            Err("the token server's answer has no token")
        );
        assert_eq!(
            parse("<html>"),
            Err("the token server's answer is not valid JSON")
        );
    }

    #[test]
    fn a_header_value_hides_itself_and_rejects_line_breaks() {
        let value = basic("a", &Secret::new("b\r\nc"));
        assert_eq!(value.to_str().unwrap(), "Basic YTpiDQpj");
        assert_eq!(format!("{value:?}"), "Sensitive");
        assert_eq!(bearer("a\r\nX: y"), None);
    }

    #[test]
    fn a_mount_needs_two_scopes() {
        let scopes = Scopes::mount("b/to", "a/from");
        let list: Vec<&str> = scopes.0.iter().map(String::as_str).collect();
        assert_eq!(
            list,
            ["repository:a/from:pull", "repository:b/to:pull,push"]
        );
    }
}

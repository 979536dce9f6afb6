//! Which secrets authorise the fetching of a git repository or a URL.
//!
//! Nobody mounts these: a secret of such an id is used for every fetch from its host.

use std::fmt;

use base64::Engine as _;
use zeroize::Zeroizing;

use super::{Secrets, SessionError};

/// The value of an `Authorization` header, wiped from memory when dropped, and where it is from.
pub struct Authorization {
    secret_id: String,
    header: Zeroizing<String>,
}

impl Authorization {
    /// The secret that it was made of.
    pub fn secret_id(&self) -> &str {
        &self.secret_id
    }

    /// The header's value, of printable characters; for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.header
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorization")
            .field("secret_id", &self.secret_id)
            .finish_non_exhaustive()
    }
}

/// What a secret holds.
enum Form {
    /// The whole value of the header.
    Header,
    /// A token, sent as the password of GitHub's `x-access-token`.
    BasicToken,
    /// A bearer token.
    BearerToken,
}

impl Secrets {
    /// What to send when a git repository is fetched over HTTP(S) from `host`, which has its
    /// port if the URL has one.
    ///
    /// The first that was given of `GIT_AUTH_HEADER.HOST`, `GIT_AUTH_TOKEN.HOST`,
    /// `GIT_AUTH_HEADER` and `GIT_AUTH_TOKEN` (BuildKit's `source/git`). See
    /// [`git_auth_scope`] for the URLs it may be sent to.
    ///
    /// # Errors
    /// As [`Secrets::get`]; [`SessionError::AuthSecret`] if it cannot be a header.
    pub fn git_auth(&self, host: &str) -> Result<Option<Authorization>, SessionError> {
        self.first_auth([
            (format!("GIT_AUTH_HEADER.{host}"), Form::Header),
            (format!("GIT_AUTH_TOKEN.{host}"), Form::BasicToken),
            ("GIT_AUTH_HEADER".to_owned(), Form::Header),
            ("GIT_AUTH_TOKEN".to_owned(), Form::BasicToken),
        ])
    }

    /// What to send when `ADD` fetches a URL from `host`, which has no port and, if it is an
    /// IPv6 address, no brackets.
    ///
    /// `HTTP_AUTH_TOKEN_HOST` if it was given, else `HTTP_AUTH_HEADER_HOST` (in BuildKit's
    /// `source/http` the token is set last and so replaces the header).
    ///
    /// # Errors
    /// As [`Secrets::git_auth`].
    pub fn http_auth(&self, host: &str) -> Result<Option<Authorization>, SessionError> {
        self.first_auth([
            (format!("HTTP_AUTH_TOKEN_{host}"), Form::BearerToken),
            (format!("HTTP_AUTH_HEADER_{host}"), Form::Header),
        ])
    }

    fn first_auth<const N: usize>(
        &self,
        candidates: [(String, Form); N],
    ) -> Result<Option<Authorization>, SessionError> {
        for (secret_id, form) in candidates {
            if let Some(secret) = self.get(&secret_id)? {
                let header = header(&secret_id, secret.expose(), &form)?;
                return Ok(Some(Authorization { secret_id, header }));
            }
        }
        Ok(None)
    }
}

fn header(id: &str, secret: &[u8], form: &Form) -> Result<Zeroizing<String>, SessionError> {
    let wrong = |problem| SessionError::AuthSecret {
        id: id.to_owned(),
        problem,
    };
    let text = std::str::from_utf8(secret).map_err(|_| wrong("it is not UTF-8"))?;
    // Editors and `echo` end files with a line break, which no header can have.
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    // A line break would begin another header.
    if text.chars().any(char::is_control) {
        return Err(wrong("it has a line break or another control character"));
    }
    Ok(Zeroizing::new(match form {
        Form::Header => text.to_owned(),
        Form::BearerToken => format!("Bearer {text}"),
        Form::BasicToken => {
            let pair = Zeroizing::new(format!("x-access-token:{text}"));
            let encoded =
                Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(pair.as_bytes()));
            format!("basic {}", encoded.as_str())
        }
    }))
}

/// The prefix of the URLs that may be shown what [`Secrets::git_auth`] gives for `remote`.
///
/// That is `remote` itself, so that a submodule elsewhere does not get it; on github.com the
/// whole host, as GitHub's own checkout action does it.
pub fn git_auth_scope(remote: &str) -> &str {
    ["https://github.com/", "https://www.github.com/"]
        .into_iter()
        .find(|prefix| remote.starts_with(prefix))
        .unwrap_or(remote)
}

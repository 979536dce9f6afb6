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
    /// `GIT_AUTH_HEADER` and `GIT_AUTH_TOKEN` (BuildKit's `source/git`). Which URLs it may be
    /// sent to, who fetches decides.
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

    /// What to send when `ADD` fetches a URL from `host`, without its port; the brackets of an IPv6
    /// address are in no secret's name.
    ///
    /// `HTTP_AUTH_TOKEN_HOST` if it was given, else `HTTP_AUTH_HEADER_HOST` (in BuildKit's
    /// `source/http` the token is set last and so replaces the header).
    ///
    /// # Errors
    /// As [`Secrets::git_auth`].
    pub fn http_auth(&self, host: &str) -> Result<Option<Authorization>, SessionError> {
        let host = host.trim_matches(['[', ']']);
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

#[cfg(test)]
mod tests {
    use super::super::SecretSpec;
    use super::*;

    /// Secrets of these ids and values.
    fn secrets(given: &[(&str, &str)]) -> Secrets {
        let specs = given.iter().map(|(id, _)| SecretSpec {
            id: (*id).to_owned(),
            file: None,
            variable: Some((*id).to_owned()),
        });
        let value = |name: &str| {
            let found = given.iter().find(|(id, _)| *id == name);
            found.map(|(_, value)| value.into())
        };
        Secrets::new(specs, value).unwrap()
    }

    /// Id and header.
    fn shown(found: Option<Authorization>) -> Option<(String, String)> {
        found.map(|found| (found.secret_id().to_owned(), found.expose().to_owned()))
    }

    fn is(id: &str, header: &str) -> Option<(String, String)> {
        Some((id.to_owned(), header.to_owned()))
    }

    #[test]
    fn a_host_before_all_hosts_and_a_header_before_a_token() {
        let mut given = vec![
            ("GIT_AUTH_HEADER.h:8443", "header h"),
            ("GIT_AUTH_TOKEN.h:8443", "token h"),
            ("GIT_AUTH_HEADER", "header"),
            ("GIT_AUTH_TOKEN", "token"),
            ("GIT_AUTH_TOKEN.other", "elsewhere"),
        ];
        let mut next = || {
            let found = secrets(&given).git_auth("h:8443").unwrap();
            given.remove(0);
            shown(found)
        };
        assert_eq!(next(), is("GIT_AUTH_HEADER.h:8443", "header h"));
        // printf 'x-access-token:token h' | base64
        let encoded = "basic eC1hY2Nlc3MtdG9rZW46dG9rZW4gaA==";
        assert_eq!(next(), is("GIT_AUTH_TOKEN.h:8443", encoded));
        assert_eq!(next(), is("GIT_AUTH_HEADER", "header"));
        let encoded = "basic eC1hY2Nlc3MtdG9rZW46dG9rZW4=";
        assert_eq!(next(), is("GIT_AUTH_TOKEN", encoded));
        assert_eq!(next(), None);
    }

    #[test]
    fn urls_have_secrets_of_their_host_only() {
        let given = [
            ("HTTP_AUTH_HEADER_h", "Basic abc"),
            ("HTTP_AUTH_TOKEN_h", "t"),
            ("HTTP_AUTH_HEADER_i", "Basic def"),
            ("HTTP_AUTH_TOKEN_::1", "six"),
            ("GIT_AUTH_TOKEN", "no"),
        ];
        let secrets = secrets(&given);
        let get = |host| shown(secrets.http_auth(host).unwrap());
        assert_eq!(get("h"), is("HTTP_AUTH_TOKEN_h", "Bearer t"));
        assert_eq!(get("i"), is("HTTP_AUTH_HEADER_i", "Basic def"));
        assert_eq!(get("[::1]"), is("HTTP_AUTH_TOKEN_::1", "Bearer six"));
        assert_eq!(get("j"), None);
    }

    #[test]
    fn a_secret_is_one_header() {
        let check = |value: &str, expected: Result<&str, &str>| {
            let got = secrets(&[("HTTP_AUTH_TOKEN_h", value)]).http_auth("h");
            let got = got.map(|found| found.unwrap().expose().to_owned());
            let got = got.map_err(|error| error.to_string());
            let expected = expected.map(str::to_owned).map_err(|e| {
                format!("secret \"HTTP_AUTH_TOKEN_h\" cannot authorise a request: {e}")
            });
            assert_eq!(got, expected);
        };
        check("t\n", Ok("Bearer t"));
        check("t\r\n", Ok("Bearer t"));
        check("", Ok("Bearer "));
        let control = "it has a line break or another control character";
        check("t\nHost: x", Err(control));
        check("t\n\n", Err(control));
        check("t\0", Err(control));
        let shown = secrets(&[("HTTP_AUTH_TOKEN_h", "hunter2")]).http_auth("h");
        assert_eq!(
            format!("{shown:?}"),
            "Ok(Some(Authorization { secret_id: \"HTTP_AUTH_TOKEN_h\", .. }))"
        );
    }
}

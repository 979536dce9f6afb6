//! `/`: one page that shows jobs and follows a log, live.
//!
//! The page is one embedded file without foreign assets. Its content security policy
//! allows exactly its own style and script, by hash, and connections to this service;
//! a title or log line that found a way into the markup would still not run.

use std::sync::LazyLock;

use axum::Router;
use axum::http::header;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::App;

const PAGE: &str = include_str!("page.html");

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag| STANDARD.encode(Sha256::digest(content(tag).as_bytes()));
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script"),
    )
});

pub(crate) fn routes() -> Router<App> {
    Router::new().route("/", get(page))
}

async fn page() -> Response {
    let policy = [(header::CONTENT_SECURITY_POLICY, POLICY.as_str())];
    (policy, Html(PAGE)).into_response()
}

/// What stands between `<tag>` and `</tag>`; the browser hashes exactly this.
fn content(tag: &str) -> &'static str {
    PAGE.split_once(&format!("<{tag}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")))
        .map(|(content, _)| content)
        .expect("the page has one style and one script, which a test checks")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_one_style_and_one_script_and_nothing_from_elsewhere() {
        for tag in ["style", "script"] {
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1);
            assert!(!content(tag).trim().is_empty());
        }
        for forbidden in [
            "http:",
            "https:",
            "src=",
            "innerHTML",
            "insertAdjacent",
            "document.write",
            " style=",
            " onclick=",
        ] {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
        assert_eq!(POLICY.matches("'sha256-").count(), 2);
    }
}

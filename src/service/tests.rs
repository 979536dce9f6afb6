use std::collections::HashMap;

use super::*;

/// A configuration whose files are all in `dir`.
pub(super) fn config(dir: &Path) -> ServiceConfig {
    let root = dir.join("store");
    let env: HashMap<&str, String> = [
        ("SOCKLESS_LISTEN", "127.0.0.1:0".to_owned()),
        ("SOCKLESS_WEBHOOK_SECRET", "s3cret".to_owned()),
        ("SOCKLESS_REGISTRY", "r.example:5000".to_owned()),
        ("SOCKLESS_ROOT", root.display().to_string()),
        ("SOCKLESS_SHUTDOWN_GRACE", "1s".to_owned()),
    ]
    .into();
    ServiceConfig::load(None, |name| env.get(name).cloned()).unwrap()
}

//! A server before a registry that passes everything on, but for what the test says.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// How much is passed on at once, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// A request without its body.
#[derive(Clone, Debug)]
pub struct Head {
    pub method: String,
    pub path: String,
    /// Whether its body has no length beforehand.
    pub is_chunked: bool,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Action {
    /// The registry answers it.
    Pass,
    /// It is answered with this status.
    Status(u16),
    /// The registry answers it, and the last byte of the answer is another.
    Spoil,
    /// So many bytes of its body are passed on, and the rest when the gate is open.
    Hold(usize, Gate),
}

/// Whoever passes waits until it is opened.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// Opens it for good.
    pub fn open(&self) {
        *self.0.0.lock().expect("no panic while held") = true;
        self.0.1.notify_all();
    }

    /// Waits until it is open; for ten minutes at most, so that no test hangs.
    pub fn pass(&self) {
        let is_open = self.0.0.lock().expect("no panic while held");
        let waited =
            (self.0.1).wait_timeout_while(is_open, Duration::from_secs(600), |is_open| !*is_open);
        drop(waited.expect("no panic while held"));
    }
}

/// A running proxy; it ends with the test's process.
#[derive(Debug)]
pub struct Proxy {
    /// `HOST:PORT`.
    pub host: String,
    seen: Arc<Mutex<Vec<Head>>>,
}

type Rule = dyn Fn(&Head) -> Action + Send + Sync;

impl Proxy {
    /// Starts one before `HOST:PORT`. `rule` is asked of each request before it is passed on.
    pub fn start(target: &str, rule: impl Fn(&Head) -> Action + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("it is bound").to_string();
        let (target, seen) = (target.to_owned(), Arc::<Mutex<Vec<Head>>>::default());
        let (rule, shared): (Arc<Rule>, _) = (Arc::new(rule), Arc::clone(&seen));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (target, rule, seen) = (target.clone(), Arc::clone(&rule), Arc::clone(&shared));
                // Whoever breaks the connection has its reasons.
                std::thread::spawn(move || serve(client, &target, &*rule, &seen));
            }
        });
        Self { host, seen }
    }

    /// The requests that came so far, oldest first.
    pub fn seen(&self) -> Vec<Head> {
        self.seen.lock().expect("no panic while held").clone()
    }
}

/// Answers one request and closes the connection.
fn serve(
    client: TcpStream,
    target: &str,
    rule: &Rule,
    seen: &Mutex<Vec<Head>>,
) -> std::io::Result<()> {
    let mut from_client = BufReader::new(client.try_clone()?);
    let mut to_client = client;
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if from_client.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line == "\r\n" {
            break;
        }
        lines.push(line);
    }
    let is = |line: &str, name: &str| line.to_ascii_lowercase().starts_with(name);
    let mut words = lines.first().map_or("", String::as_str).split(' ');
    let mut word = || words.next().unwrap_or_default().to_owned();
    let head = Head {
        method: word(),
        path: word(),
        is_chunked: lines.iter().any(|line| is(line, "transfer-encoding:")),
    };
    let action = rule(&head);
    seen.lock().expect("no panic while held").push(head);
    if let Action::Status(status) = action {
        let answer =
            format!("HTTP/1.1 {status} Test\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        return to_client.write_all(answer.as_bytes());
    }
    // One request a connection, so that its end is the answer's.
    lines.retain(|line| !is(line, "connection:"));
    let mut server = TcpStream::connect(target)?;
    server.write_all((lines.concat() + "Connection: close\r\n\r\n").as_bytes())?;
    let mut to_server = server.try_clone()?;
    let hold = match &action {
        Action::Hold(bytes, gate) => Some((*bytes, gate.clone())),
        _ => None,
    };
    std::thread::spawn(move || {
        if let Some((bytes, gate)) = hold {
            let mut first = (&mut from_client).take(bytes as u64);
            pass_on(&mut first, &mut to_server)?;
            gate.pass();
        }
        let passed = pass_on(&mut from_client, &mut to_server);
        // Who asked has gone: whatever else comes is for nobody.
        let _ = to_server.shutdown(Shutdown::Both);
        passed
    });
    if let Action::Spoil = action {
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        if let Some(last) = answer.last_mut() {
            *last ^= 1;
        }
        to_client.write_all(&answer)?;
    } else {
        pass_on(&mut server, &mut to_client)?;
    }
    to_client.shutdown(Shutdown::Both)
}

fn pass_on(from: &mut impl Read, to: &mut TcpStream) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = from.read(&mut piece)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&piece[..read])?;
    }
}

//! The server process: started on free ports, waited for, stopped.

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Error;
use super::places::{LOOK, Places, State, failed};

/// The port Temporal clients try when told nothing.
const DEFAULT_PORT: u16 = 7233;
/// A cold start of a 150 MB program on a busy machine stays far below this.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// How long the server may take to end by itself.
const END_WITHIN: Duration = Duration::from_secs(15);
/// How long finished jobs stay visible; the server's own default is one day.
const RETENTION: &str = "720h";
/// What jobs can be searched by.
const SEARCH_ATTRIBUTES: [&str; 3] = ["UserId=Keyword", "GvJobType=Keyword", "GvStatus=Keyword"];

/// How the server is set, as `KEY=VALUE` of its dynamic configuration.
///
/// Jobs wait in one row, so that priorities hold exactly, and users take turns in it. Jobs that wait since before are
/// found all the same: only where new ones are put changes.
///
/// Whoever does not answer a ping loses its connection, and with it the polls that a frozen worker or a machine that
/// was cut off leaves behind: else the next attempt of a stage is handed to it again, for one more heartbeat timeout.
///
/// A server of several hosts sets its timers at least a second ahead, since their clocks differ; one process has one
/// clock, so an attempt that is due in half a second comes then.
pub const DYNAMIC_CONFIG: [&str; 5] = [
    "matching.numTaskqueueWritePartitions=1",
    "matching.enableFairness=true",
    "frontend.keepAliveTime=\"2s\"",
    "frontend.keepAliveTimeout=\"7s\"",
    "history.timerProcessorMaxTimeShift=\"50ms\"",
];

/// Starts a server and waits until it answers. The caller has the turn.
pub(super) async fn start(
    places: &Places,
    program: &Path,
    preferred: Option<u16>,
) -> Result<State, Error> {
    let is_new = !places.database.is_file();
    // Two servers of this user that start at once would take the same free ports, and each other's answers.
    let _alone = places.start_alone().await?;
    let mut preferred = Some(preferred.unwrap_or(DEFAULT_PORT));
    let mut tries = 3;
    loop {
        let state = spawn(places, program, ports(preferred)?).await?;
        match wait_until_ready(places, &state).await {
            Ok(()) => {
                if is_new {
                    keep_history(program, &state).await;
                }
                return Ok(state);
            }
            // Somebody took a port between the look and the start.
            Err(Error::Died { said, .. })
                if tries > 1 && said.contains("address already in use") =>
            {
                (preferred, tries) = (None, tries - 1);
            }
            Err(error) => {
                ask_to_end(places);
                return Err(error);
            }
        }
    }
}

/// Waits until the default namespace can be used. The web page's proxy asks the gRPC service, so it knows.
pub(super) async fn wait_until_ready(places: &Places, state: &State) -> Result<(), Error> {
    let started = Instant::now();
    while !answers(&state.ui_url).await {
        if !places.is_alive() {
            return Err(Error::Died { said: beginning(&places.log), log: places.log.clone() });
        }
        if started.elapsed() > READY_WITHIN {
            return Err(Error::NotReady {
                address: state.address.clone(),
                pid: state.pid,
                seconds: READY_WITHIN.as_secs(),
                log: places.log.clone(),
            });
        }
        tokio::time::sleep(LOOK).await;
    }
    // Another server may have taken the ports in the meantime and answered for ours.
    if places.is_alive() {
        Ok(())
    } else {
        Err(Error::Died { said: beginning(&places.log), log: places.log.clone() })
    }
}

/// Ends the server and waits for it: asked first, killed when it does not obey. The caller has the turn.
pub(super) async fn stop(places: &Places) -> Result<(), Error> {
    let Some(state) = places.running()? else { return Ok(()) };
    for number in [libc::SIGTERM, libc::SIGKILL] {
        signal(state.pid, number);
        let asked = Instant::now();
        while places.is_alive() && asked.elapsed() < END_WITHIN {
            tokio::time::sleep(LOOK).await;
        }
        if !places.is_alive() {
            return places.write_state(None);
        }
    }
    Err(Error::Stubborn { pid: state.pid })
}

/// Asks the server to end, without waiting.
pub(super) fn ask_to_end(places: &Places) {
    if let Ok(Some(state)) = places.running() {
        signal(state.pid, libc::SIGTERM);
    }
}

async fn spawn(
    places: &Places,
    program: &Path,
    (port, ui_port): (u16, u16),
) -> Result<State, Error> {
    let lock = places.lock_server().await?;
    places.write_state(None)?;
    let log = places.open_log()?;
    let copy = log.try_clone().map_err(|source| failed(&places.log, source))?;
    let mut command = Command::new(program);
    command
        .args([
            "server",
            "start-dev",
            "--ip",
            "127.0.0.1",
            "--log-level",
            "error",
            "--ui-disable-news-fetch",
        ])
        .args(["--disable-config-env", "--disable-config-file"])
        .args(["--port", &port.to_string(), "--ui-port", &ui_port.to_string()])
        .arg("--db-filename")
        .arg(&places.database)
        .args(DYNAMIC_CONFIG.iter().flat_map(|value| ["--dynamic-config-value", value]))
        .args(SEARCH_ATTRIBUTES.iter().flat_map(|attribute| ["--search-attribute", attribute]))
        .env("TEMPORAL_VERSION_CHECK_DISABLED", "1")
        .current_dir(&places.folder)
        // Its own group: Ctrl-C in the terminal is for us, who still need it to end our jobs in order.
        .process_group(0)
        .stdin(Stdio::from(lock))
        .stdout(Stdio::from(log))
        .stderr(Stdio::from(copy));
    let spawned = command.spawn();
    // The command holds our copy of the lock; from here on only the server does.
    drop(command);
    let mut child =
        spawned.map_err(|source| Error::Spawn { program: program.to_owned(), source })?;
    let pid = i32::try_from(child.id()).expect("process ids fit pid_t");
    let state = State {
        pid,
        address: format!("127.0.0.1:{port}"),
        ui_url: format!("http://127.0.0.1:{ui_port}"),
    };
    let written = places.write_state(Some(&state));
    if written.is_err() {
        child.kill().ok();
    }
    // Whoever stops it, we are its parent and must not leave a zombie.
    thread::spawn(move || child.wait());
    written.map(|()| state)
}

/// The preferred port when it is free, else any; the web page's a thousand above when that is free.
fn ports(preferred: Option<u16>) -> Result<(u16, u16), Error> {
    let port = match preferred.filter(|&port| is_free(port)) {
        Some(port) => port,
        None => free_port()?,
    };
    let ui_port = match port.checked_add(1000).filter(|&port| is_free(port)) {
        Some(port) => port,
        None => free_port()?,
    };
    Ok((port, ui_port))
}

fn is_free(port: u16) -> bool {
    // The second look finds who listens on every address where binding one of them would still succeed.
    port != 0
        && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
        && TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err()
}

fn free_port() -> Result<u16, Error> {
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(|source| Error::NoPort { source })
}

/// Whether the server answers a request about its default namespace.
async fn answers(ui_url: &str) -> bool {
    let host = ui_url.trim_start_matches("http://");
    let request = format!(
        "GET /api/v1/namespaces/default HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    );
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(host).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        Ok::<_, io::Error>(status == *b"HTTP/1.1 200")
    };
    matches!(tokio::time::timeout(Duration::from_secs(5), ask).await, Ok(Ok(true)))
}

/// Lets finished jobs stay visible for a month. A server without it still works, so a failure is only logged.
async fn keep_history(program: &Path, state: &State) {
    let update = tokio::process::Command::new(program)
        .args([
            "operator",
            "namespace",
            "update",
            "--namespace",
            "default",
            "--retention",
            RETENTION,
        ])
        .args(["--address", &state.address, "--disable-config-env", "--disable-config-file"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match tokio::time::timeout(Duration::from_secs(20), update).await {
        Ok(Ok(status)) if status.success() => {}
        outcome => {
            tracing::warn!(?outcome, "cannot raise the retention of finished jobs above one day")
        }
    }
}

/// The first lines of a log, for an error.
fn beginning(log: &Path) -> String {
    const LENGTH: u64 = 1200;
    const LINES: usize = 5;
    let mut start = Vec::new();
    // What cannot be read says nothing.
    File::open(log).and_then(|file| file.take(LENGTH).read_to_end(&mut start)).ok();
    let text = String::from_utf8_lossy(&start);
    text.trim().lines().take(LINES).collect::<Vec<_>>().join("\n")
}

/// Sends `number` to the server, which the caller has just seen alive.
fn signal(pid: i32, number: libc::c_int) {
    // Zero and negative ids mean whole groups of processes.
    if pid > 1 {
        // SAFETY: kill only takes two integers; a process that is gone is an error, which is as good as ended.
        unsafe { libc::kill(pid, number) };
    }
}

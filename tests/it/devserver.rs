//! The embedded Temporal server: found, started, shared, left. These tests run the real program.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use genvideo::devserver::{self, DevServer, Error};

/// The Temporal CLI of this machine: `TEMPORAL_CLI`, PATH, or where `scripts/setup` puts it.
fn program() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache
        .unwrap_or_else(|| PathBuf::from(env::var_os("HOME").expect("HOME is set")).join(".cache"));
    let named = env::var_os("TEMPORAL_CLI").map(PathBuf::from);
    devserver::find(named.as_deref(), &cache.join("genvideo")).unwrap_or_else(|error| {
        panic!(
            "these tests need the Temporal CLI: {error}; {}, or set TEMPORAL_CLI",
            error.hint().unwrap()
        )
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A port nobody listens on, so that tests do not meet on 7233.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

async fn start(data: &Path) -> DevServer {
    DevServer::join_or_start(data, &program(), Some(free_port())).await.unwrap()
}

fn listens(address: &str) -> bool {
    TcpStream::connect(address).is_ok()
}

/// Runs the Temporal CLI against a server; its standard output when it succeeds.
fn temporal(server: &DevServer, arguments: &[&str]) -> String {
    let output = Command::new(program())
        .args(arguments)
        .args(["--address", server.address(), "--disable-config-env", "--disable-config-file"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A program that stands in for the Temporal CLI.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("temporal");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn it_is_shared_and_the_last_user_stops_it() {
    runtime().block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("Daten für alle");
        assert_eq!(devserver::is_running(&data), None);
        assert!(!devserver::has_database(&data));

        let (first, second) = tokio::join!(start(&data), start(&data));
        assert!(first.started_here() != second.started_here(), "one starts, the other joins");
        assert_eq!(
            (first.pid(), first.address(), first.ui_url()),
            (second.pid(), second.address(), second.ui_url())
        );
        let (pid, address) = (first.pid(), first.address().to_owned());
        let running = devserver::is_running(&data).unwrap();
        assert_eq!((running.pid, &running.address), (pid, &address));
        assert!(devserver::has_database(&data));

        first.leave().await.unwrap();
        assert!(listens(&address), "the second still uses it");
        second.leave().await.unwrap();
        assert_eq!(devserver::is_running(&data), None);
        assert!(devserver::has_database(&data));
    });
}

#[test]
fn a_restart_finds_what_the_database_holds() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let server = start(data.path()).await;
        let attributes = temporal(&server, &["operator", "search-attribute", "list"]);
        for name in ["UserId", "GvJobType", "GvStatus"] {
            assert!(attributes.contains(name), "{name} in {attributes}");
        }
        assert!(
            temporal(&server, &["operator", "namespace", "describe", "default"]).contains("720h")
        );
        let job = [
            "workflow",
            "start",
            "--type",
            "Nothing",
            "--task-queue",
            "nobody",
            "--workflow-id",
            "kept",
        ];
        temporal(&server, &job);
        server.leave().await.unwrap();

        let server = start(data.path()).await;
        assert!(server.started_here());
        assert!(
            temporal(&server, &["workflow", "describe", "--workflow-id", "kept"])
                .contains("Nothing")
        );
        assert!(
            temporal(&server, &["operator", "namespace", "describe", "default"]).contains("720h")
        );
        server.leave().await.unwrap();
    });
}

#[test]
fn a_taken_port_is_passed_over() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let server = DevServer::join_or_start(data.path(), &program(), Some(port)).await.unwrap();
        assert_ne!(server.address(), format!("127.0.0.1:{port}"));
        assert!(listens(server.address()));
        server.leave().await.unwrap();
    });
}

#[test]
fn two_servers_that_want_the_same_port_at_the_same_moment_both_start() {
    let data = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let port = free_port();
    let servers = data.each_ref().map(|data| {
        let data = data.path().to_owned();
        thread::spawn(move || {
            runtime().block_on(async {
                let server = DevServer::join_or_start(&data, &program(), Some(port)).await.unwrap();
                let (address, ui) = (server.address().to_owned(), server.ui_url().to_owned());
                assert!(listens(&address));
                (address, ui, server)
            })
        })
    });
    let [first, second] = servers.map(|server| server.join().unwrap());
    assert!(first.0 != second.0 && first.1 != second.1, "{first:?} {second:?}");
    runtime().block_on(async {
        first.2.leave().await.unwrap();
        second.2.leave().await.unwrap();
    });
}

#[test]
fn a_state_file_of_a_dead_server_is_not_believed() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("temporal")).unwrap();
        // The process id of a program that lives and is no server: this one.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let own = std::process::id();
        let state = format!(r#"{{"pid":{own},"address":"{address}","ui_url":"http://{address}"}}"#);
        fs::write(data.path().join("temporal/server.json"), state).unwrap();
        assert_eq!(devserver::is_running(data.path()), None);
        let server = start(data.path()).await;
        assert!(server.started_here());
        assert_ne!(server.pid().to_string(), own.to_string());
        assert_ne!(server.address(), address);
        server.leave().await.unwrap();
    });
}

#[test]
fn a_killed_server_is_started_again() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let first = start(data.path()).await;
        // SAFETY: the server is a child of this test's own folder, and still there.
        assert_eq!(unsafe { libc::kill(first.pid(), libc::SIGKILL) }, 0);
        // Joins if the kill has not struck yet, and then fails; the lock tells when the process is gone.
        let gone = File::open(data.path().join("temporal/server.lock")).unwrap();
        gone.lock().unwrap();
        drop(gone);
        assert_eq!(devserver::is_running(data.path()), None);
        let second = start(data.path()).await;
        assert!(second.started_here());
        first.leave().await.unwrap();
        assert!(listens(second.address()));
        second.leave().await.unwrap();
    });
}

#[test]
fn a_killed_user_does_not_count() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let server = start(data.path()).await;
        // Another program that is a user: it holds the lock, says so, and is killed.
        let lock = data.path().join("temporal/users.lock");
        let hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print('held', flush=True); sys.stdin.read()";
        let mut user = Command::new("python3")
            .args(["-c", hold])
            .arg(&lock)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut held = [0; 4];
        user.stdout.as_mut().unwrap().read_exact(&mut held).unwrap();
        user.kill().unwrap();
        user.wait().unwrap();
        server.leave().await.unwrap();
        assert_eq!(devserver::is_running(data.path()), None);
    });
}

#[test]
fn a_user_in_another_process_keeps_it_running() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let server = start(data.path()).await;
        let address = server.address().to_owned();
        let other = File::open(data.path().join("temporal/users.lock")).unwrap();
        other.lock_shared().unwrap();
        server.leave().await.unwrap();
        assert!(listens(&address));
        other.unlock().unwrap();
        start(data.path()).await.leave().await.unwrap();
        assert_eq!(devserver::is_running(data.path()), None);
    });
}

#[test]
fn a_dropped_handle_asks_the_server_to_end() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        drop(start(data.path()).await);
        let gone = File::open(data.path().join("temporal/server.lock")).unwrap();
        gone.lock().unwrap();
        drop(gone);
        assert_eq!(devserver::is_running(data.path()), None);
    });
}

#[test]
fn a_start_that_is_given_up_leaves_no_server() {
    runtime().block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let silent = script(folder.path(), "exec tail -f /dev/null");
        let (mut said, says) = io::pipe().unwrap();
        let (waits, let_go) = io::pipe().unwrap();
        let runs = async {
            while devserver::is_running(&data).is_none() {
                tokio::task::yield_now().await;
            }
            // A process on its way to become another program, which still has every open file of this one.
            let mut other = Command::new("true");
            let mut ends = Some((says, waits));
            let forked = move || {
                let (mut says, mut waits) = ends.take().expect("called once");
                says.write_all(b"x")?;
                waits.read_exact(&mut [0])
            };
            // SAFETY: between fork and exec it writes to one pipe and reads from another.
            unsafe { other.pre_exec(forked) };
            let other = thread::spawn(move || other.status());
            said.read_exact(&mut [0]).unwrap();
            other
        };
        let other = tokio::select! {
            answered = DevServer::join_or_start(&data, &silent, None) => panic!("{answered:?}"),
            other = runs => other,
        };
        let given_up = Instant::now();
        while devserver::is_running(&data).is_some() {
            assert!(given_up.elapsed() < Duration::from_secs(60), "it still runs");
            tokio::task::yield_now().await;
        }
        { let_go }.write_all(b"x").unwrap();
        assert!(other.join().unwrap().unwrap().success());
    });
}

#[test]
fn failures_say_what_to_do() {
    runtime().block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");

        let absent =
            devserver::find(Some(&folder.path().join("nowhere")), folder.path()).unwrap_err();
        assert!(matches!(absent, Error::NoProgram { .. }));
        assert!(absent.to_string().contains("nowhere"), "{absent}");
        assert!(absent.hint().unwrap().contains("scripts/setup"));

        let missing = DevServer::join_or_start(&data, &folder.path().join("nowhere"), None)
            .await
            .unwrap_err();
        assert!(matches!(missing, Error::Spawn { .. }), "{missing}");
        assert!(missing.hint().is_some());

        let angry = script(folder.path(), "echo database is broken >&2; exit 1");
        let died = DevServer::join_or_start(&data, &angry, None).await.unwrap_err();
        assert!(matches!(died, Error::Died { .. }), "{died}");
        assert!(died.to_string().contains("database is broken"), "{died}");
        assert!(died.hint().unwrap().contains("server.log"));
        assert_eq!(devserver::is_running(&data), None);

        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let blocked = DevServer::join_or_start(&file, &angry, None).await.unwrap_err();
        assert!(matches!(blocked, Error::Folder { .. }), "{blocked}");
    });
}

#[test]
fn a_server_without_a_state_file_is_reported_not_killed() {
    runtime().block_on(async {
        let data = tempfile::tempdir().unwrap();
        let server = start(data.path()).await;
        let state = data.path().join("temporal/server.json");
        let text = fs::read(&state).unwrap();
        fs::write(&state, "{").unwrap();
        assert_eq!(devserver::is_running(data.path()), None);
        let error = DevServer::join_or_start(data.path(), &program(), None).await.unwrap_err();
        assert!(matches!(error, Error::Stray { .. }), "{error}");
        assert!(error.hint().unwrap().contains("server.lock"));
        fs::write(&state, text).unwrap();
        server.leave().await.unwrap();
    });
}

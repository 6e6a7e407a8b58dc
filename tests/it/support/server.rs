//! The Temporal dev server the tests run against: one for the test binary, with its own data, gone when it ends.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use genvideo::devserver::DYNAMIC_CONFIG;

/// Ports are taken and given back before the server binds them, so another process may be quicker.
const TRIES: usize = 5;

/// Address of the shared server, which the first caller starts.
pub(crate) fn address() -> String {
    static SERVER: OnceLock<String> = OnceLock::new();
    SERVER.get_or_init(start).clone()
}

/// The `temporal` program: `TEMPORAL_CLI`, then `PATH`, then the tool cache `scripts/setup` fills.
pub(crate) fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("TEMPORAL_CLI").filter(|path| !path.is_empty()) {
        return PathBuf::from(named);
    }
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|folder| folder.join("temporal"))
            .find(|file| file.is_file())
    });
    let cached = cache().join("genvideo/tools/temporal");
    on_path.or_else(|| cached.is_file().then_some(cached)).unwrap_or_else(|| {
        panic!("no `temporal` program: run scripts/setup, or set TEMPORAL_CLI to one, or put it on PATH")
    })
}

/// The user's cache folder.
pub(crate) fn cache() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
        PathBuf::from,
    )
}

fn start() -> String {
    let program = program();
    let folder = super::process_folder().join("temporal");
    std::fs::create_dir_all(&folder).expect("a folder for the server");
    for _ in 0..TRIES {
        let port = free_port();
        let mut child = spawn(&program, &folder, port);
        if is_up(&mut child, port) {
            return format!("127.0.0.1:{port}");
        }
    }
    let log = std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
    panic!("`{}` did not start {TRIES} times; its log:\n{log}", program.display());
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// Starts the server from a thread that lives as long as the process: its parent's death signal follows the thread.
pub(crate) fn spawn(program: &Path, folder: &Path, port: u16) -> Child {
    let log = std::fs::File::create(folder.join("server.log")).expect("a log file");
    let errors = log.try_clone().expect("a second handle");
    let mut command = Command::new(program);
    command
        .args(["server", "start-dev", "--headless", "--ip", "127.0.0.1", "--log-level", "error"])
        .args(DYNAMIC_CONFIG.iter().flat_map(|value| ["--dynamic-config-value", value]))
        .arg("--port")
        .arg(port.to_string())
        .arg("--db-filename")
        .arg(folder.join(format!("{port}.db")))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    keep(command)
}

/// Starts a server that ends with this process.
pub(crate) fn keep(mut command: Command) -> Child {
    // SAFETY: between fork and exec only `prctl` is called, which is safe to call from a signal handler.
    unsafe {
        command.pre_exec(|| {
            #[cfg(target_os = "linux")]
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        sender.send(command.spawn()).expect("the caller waits");
        loop {
            std::thread::park();
        }
    });
    receiver.recv().expect("the thread answers").expect("the server's program runs")
}

/// Waits until the port answers; false when the server ended instead.
pub(crate) fn is_up(child: &mut Child, port: u16) -> bool {
    let start = Instant::now();
    while start.elapsed() < super::PATIENCE {
        if child.try_wait().expect("a state").is_some() {
            return false;
        }
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return true;
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let _ = child.kill();
    false
}

//! A way to a server that can be cut: a TCP proxy on loopback.

use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A proxy; cut, it drops every connection and takes no new one.
pub(crate) struct Proxy {
    pub(crate) address: String,
    open: Arc<watch::Sender<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = Arc::new(watch::channel(true).0);
        let theirs = Arc::clone(&open);
        let task = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut is_open = theirs.subscribe();
                let server = server.clone();
                tokio::spawn(async move {
                    let cut = async { is_open.wait_for(|open| !open).await.map(drop) };
                    let through = async {
                        let mut far = TcpStream::connect(server).await?;
                        copy_bidirectional(&mut near, &mut far).await
                    };
                    tokio::select! { _ = cut => {}, _ = through => {} }
                });
            }
        });
        Self { address, open, task }
    }

    pub(crate) fn cut(&self) {
        self.open.send_replace(false);
    }

    pub(crate) fn mend(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

//! A bucket of an S3-compatible server as the place of a store: its address, the connection to it, and what it must keep.
//!
//! Built with the feature `s3`. Server and credentials come from variables such as `AWS_ACCESS_KEY_ID`.

use std::sync::{Arc, LazyLock};

use futures::future::join_all;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, PutMode, PutPayload};
use tokio::runtime::{Builder, Runtime};

use super::{Error, Store};

/// What the address of a bucket begins with.
const SCHEME: &str = "s3://";
/// Writers that race for one key when a bucket is opened.
const WRITERS: u8 = 8;

/// The runtime of the connections to buckets. It outlives every store, since it may not end inside another one.
pub(super) fn runtime() -> &'static Runtime {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).thread_name("store").enable_all();
        builder.build().expect("the system gives a thread")
    });
    &RUNTIME
}

/// Connects to the bucket at `address`, `s3://BUCKET` or `s3://BUCKET/PREFIX`, as those of the `variables` say that
/// `object_store` knows; nothing is sent yet.
#[cfg(feature = "s3")]
pub(super) fn connect(
    address: &str,
    variables: &[(String, String)],
) -> Result<Arc<dyn ObjectStore>, Error> {
    use object_store::prefix::PrefixStore;

    let (bucket, prefix) = parts(address)?;
    // Another part of the program may have chosen the same one already.
    rustls::crypto::ring::default_provider().install_default().ok();
    let objects = settings(variables).with_bucket_name(bucket).build().map_err(|source| {
        Error::Backend { key: address.to_owned(), message: source.to_string() }
    })?;
    Ok(Arc::new(PrefixStore::new(objects, prefix)))
}

/// What the `variables` say, and what the lock of the store needs.
#[cfg(feature = "s3")]
fn settings(variables: &[(String, String)]) -> object_store::aws::AmazonS3Builder {
    use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
    use object_store::{ClientConfigKey, RetryConfig};

    use super::lock::PATIENCE;

    let builder = variables.iter().filter(|(name, _)| name.starts_with("AWS_")).fold(
        AmazonS3Builder::new(),
        |builder, (name, value)| match name.to_ascii_lowercase().parse() {
            Ok(key) => builder.with_config(key, value),
            // Meant for other programs.
            Err(_) => builder,
        },
    );
    let keys = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
    let endpoint = keys.iter().find_map(|key| builder.get_config_value(key)).unwrap_or_default();
    let client = |key, value| (AmazonS3ConfigKey::Client(key), value);
    let mut fixed = vec![
        // A server that is silent is given up, one that takes its time over a large object is not.
        client(ClientConfigKey::ReadTimeout, format!("{}s", PATIENCE.as_secs())),
        client(ClientConfigKey::Timeout, "1h".to_owned()),
    ];
    if endpoint.starts_with("http://") {
        fixed.push(client(ClientConfigKey::AllowHttp, "true".to_owned()));
    }
    fixed
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(key, value))
        // Several servers do not know it.
        .with_disable_bulk_delete(true)
        .with_retry(RetryConfig { retry_timeout: PATIENCE, ..RetryConfig::default() })
}

/// Refuses: this program was built without the feature.
#[cfg(not(feature = "s3"))]
pub(super) fn connect(
    address: &str,
    _variables: &[(String, String)],
) -> Result<Arc<dyn ObjectStore>, Error> {
    parts(address)?;
    Err(Error::NotBuilt { address: address.to_owned() })
}

impl Store {
    /// Refuses a server that tells more than one writer of a key that it created the object.
    pub(super) fn check_exclusive(&self, address: &str) -> Result<(), Error> {
        let key = format!("probe/{}", uuid::Uuid::now_v7());
        let path = ObjectPath::from(key.as_str());
        let writers = (0..WRITERS).map(|writer| {
            let payload = PutPayload::from(vec![writer]);
            self.inner.objects.put_opts(&path, payload, PutMode::Create.into())
        });
        let answers = self.inner.wait(join_all(writers));
        let winners = answers.iter().filter(|answer| answer.is_ok()).count();
        let refusal = answers.into_iter().find_map(|answer| match answer {
            Err(object_store::Error::AlreadyExists { .. }) | Ok(_) => None,
            Err(source) => Some(self.failed(&key, &source)),
        });
        if winners > 0 {
            self.remove(&key)?;
        }
        match refusal {
            Some(error) => Err(error),
            None if winners > 1 => Err(Error::NotExclusive {
                address: address.to_owned(),
                winners,
                writers: WRITERS.into(),
            }),
            None => Ok(()),
        }
    }
}

/// Name of the bucket, and prefix of the keys in it, which may be empty.
fn parts(address: &str) -> Result<(&str, &str), Error> {
    let refused = || Error::Address { address: address.escape_debug().to_string() };
    let rest = address.strip_prefix(SCHEME).ok_or_else(refused)?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_end_matches('/');
    let plain = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
    };
    let named = |part: &str| !part.is_empty() && part != "." && part != ".." && plain(part);
    let prefixed = prefix.is_empty() || prefix.split('/').all(named);
    if named(bucket) && prefixed { Ok((bucket, prefix)) } else { Err(refused()) }
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[cfg(feature = "s3")]
    #[test]
    fn variables_of_the_connection_stay_beside_what_the_store_needs() {
        let set = |settings: &[(&str, &str)]| {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            super::settings(&settings.iter().map(owned).collect::<Vec<_>>())
        };
        let builder = set(&[
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000"),
            ("AWS_ALLOW_INVALID_CERTIFICATES", "true"),
            ("AWS_PROXY_URL", "http://127.0.0.1:3128"),
            ("AWS_READ_TIMEOUT", "1h"),
        ]);
        let value = |name: &str| builder.get_config_value(&name.parse().unwrap());
        for (name, wanted) in [
            ("allow_invalid_certificates", "true"),
            ("proxy_url", "http://127.0.0.1:3128"),
            ("read_timeout", "20s"),
            ("timeout", "1h"),
            ("aws_allow_http", "true"),
        ] {
            assert_eq!(value(name).as_deref(), Some(wanted), "{name}");
        }
        let secure = set(&[("AWS_ENDPOINT_URL", "https://127.0.0.1:9000")]);
        let http = secure.get_config_value(&"aws_allow_http".parse().unwrap());
        assert_ne!(http.as_deref(), Some("true"));
    }

    #[test]
    fn an_address_is_a_bucket_and_maybe_a_prefix() {
        for (address, wanted) in [
            ("s3://videos", ("videos", "")),
            ("s3://videos/", ("videos", "")),
            ("s3://my.videos-1/team/a_b/", ("my.videos-1", "team/a_b")),
        ] {
            assert_eq!(parts(address).ok(), Some(wanted), "{address}");
        }
        for address in
            ["", "s3://", "s3:///a", "http://a", "s3://a//b", "s3://a/../b", "s3://a/b c", "s3://ä"]
        {
            assert!(parts(address).is_err(), "{address}");
        }
    }
}

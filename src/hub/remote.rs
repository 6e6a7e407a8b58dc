//! The hub over HTTP: what a repository has, what each file must be, and a file's bytes from anywhere on.
//!
//! The crate `hf-hub` gives the client, its headers and TLS, the addresses, and the layout of the cache. Its version
//! 1.0 would link a second cryptography library, by way of its own transfer protocol, and does not resume; 0.5 does
//! both right, but its download says neither why the hub refused nor what the hash should be, so that the requests
//! themselves are made here.

use std::io::Read;
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use super::manifest::is_commit;
use super::pull::{Error, Hub};

/// Longest wait for a connection, for an answer, and for the next bytes of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest answer of the hub that is no file.
const MAX_ANSWER: u64 = 32 << 20;
/// Redirects that stay on the hub.
const MAX_HOPS: usize = 5;

/// One repository on the hub.
pub(super) struct Remote {
    api: Api,
    repo: String,
    has_token: bool,
}

/// What a repository has at a revision.
#[derive(Deserialize)]
pub(super) struct Listing {
    /// The commit.
    #[serde(rename = "sha")]
    pub(super) commit: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    /// Paths of all files.
    pub(super) fn files(&self) -> Vec<String> {
        self.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect()
    }
}

/// What the hub says a file is.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// SHA-256 of a large file, git's blob id of a small one.
    pub(super) etag: String,
    /// Its size.
    pub(super) bytes: u64,
    /// Where on the hub its bytes are asked for.
    address: String,
}

/// A file's bytes.
pub(super) struct Stream {
    /// Where in the file it starts: at the asked byte, or at 0 where the server knows no ranges.
    pub(super) start: u64,
    /// The bytes.
    pub(super) bytes: Box<dyn Read>,
}

/// What came back.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Box<dyn Read>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The size of the whole file, of which this is all or a part.
    fn size(&self) -> Option<u64> {
        let whole = self.header("content-range").and_then(|range| range.rsplit('/').next());
        let all = self.header("content-length").filter(|_| self.status == 200);
        self.header("x-linked-size").or(whole).or(all)?.parse().ok()
    }

    fn json<T: for<'a> Deserialize<'a>>(self, what: &str) -> Result<T, Error> {
        let malformed = |why: String| Error::Answer { what: what.to_owned(), why };
        let mut text = Vec::new();
        let read = self.body.take(MAX_ANSWER).read_to_end(&mut text);
        read.map_err(|error| Error::Connection(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
    }
}

impl Remote {
    /// The repository `repo`; nothing is asked yet.
    pub(super) fn open(hub: &Hub, repo: &str) -> Result<Self, Error> {
        let mut builder = ApiBuilder::from_cache(Cache::new(hub.cache.clone()))
            .with_user_agent("genvideo", env!("CARGO_PKG_VERSION"))
            .with_token(hub.token.clone());
        if let Some(endpoint) = &hub.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api = builder.build().map_err(|error| Error::Connection(error.to_string()))?;
        Ok(Self { api, repo: repo.to_owned(), has_token: hub.token.is_some() })
    }

    /// What the repository has at `revision`.
    pub(super) fn listing(&self, revision: &str) -> Result<Listing, Error> {
        let address = format!("{}/api/{}", self.endpoint(), self.named(revision).api_url());
        let answer = ask(&self.at(revision), &address, None, Hops::Follow)?;
        if answer.status == 200 {
            let listing: Listing = answer.json(&self.repo)?;
            // It becomes a folder's name.
            return match is_commit(&listing.commit) {
                true => Ok(listing),
                false => Err(self.odd("", "a commit that is no hash")),
            };
        }
        match self.refusal(&answer, "") {
            Error::NoRevision { repo, .. } => {
                let known = self.branches().unwrap_or_default();
                Err(Error::NoRevision { repo, revision: revision.to_owned(), known })
            }
            error => Err(error),
        }
    }

    /// What `file` must be, as the hub says before it sends any of it.
    pub(super) fn entry(&self, commit: &str, file: &str) -> Result<Entry, Error> {
        let at = self.at(commit);
        let mut address = at.url(file);
        for _ in 0..MAX_HOPS {
            let mut answer = ask(&at, &address, Some("bytes=0-0"), Hops::Stay)?;
            // An empty file has no first byte.
            let empty = answer.status == 416 && answer.size() == Some(0);
            if empty {
                answer = ask(&at, &address, None, Hops::Stay)?;
            }
            if answer.status >= 400 {
                return Err(self.refusal(&answer, file));
            }
            let etag = answer.header("x-linked-etag").or(answer.header("etag"));
            let etag = etag.map(|etag| etag.trim_start_matches("W/").replace('"', ""));
            let size = if empty { Some(0) } else { answer.size() };
            if let (Some(etag), Some(bytes)) = (etag, size) {
                return match is_plain(&etag) {
                    true => Ok(Entry { etag, bytes, address }),
                    false => Err(self.odd(file, "an ETag that is no hash")),
                };
            }
            // A path alone leads to another place on the hub, such as a repository's new name.
            match answer.header("location").filter(|to| to.starts_with('/')) {
                Some(path) => address = format!("{}{path}", self.endpoint()),
                None => return Err(self.odd(file, "no ETag or no size")),
            }
        }
        Err(self.odd(file, "too many redirects"))
    }

    /// The bytes of `file` from `start` on.
    pub(super) fn open_at(&self, file: &str, entry: &Entry, start: u64) -> Result<Stream, Error> {
        let range = format!("bytes={start}-");
        let answer = ask(&self.at("main"), &entry.address, Some(&range), Hops::Follow)?;
        let from: Option<u64> = answer
            .header("content-range")
            .and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
        match (answer.status, from) {
            (206, Some(from)) if from == start => Ok(Stream { start, bytes: answer.body }),
            (200, _) => Ok(Stream { start: 0, bytes: answer.body }),
            (206, _) => Err(self.odd(file, "another range than asked for")),
            _ => Err(self.refusal(&answer, file)),
        }
    }

    /// The page of the repository, for people.
    pub(super) fn page(&self) -> String {
        format!("{}/{}", self.endpoint(), self.repo)
    }

    fn named(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision.to_owned())
    }

    fn at(&self, revision: &str) -> ApiRepo {
        self.api.repo(self.named(revision))
    }

    fn endpoint(&self) -> String {
        let url = self.at("main").url("");
        let path = format!("/{}/resolve/", self.repo);
        url.split(&path).next().unwrap_or(&url).to_owned()
    }

    fn branches(&self) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Refs {
            #[serde(default)]
            branches: Vec<Ref>,
            #[serde(default)]
            tags: Vec<Ref>,
        }
        #[derive(Deserialize)]
        struct Ref {
            name: String,
        }
        let address = format!("{}/api/models/{}/refs", self.endpoint(), self.repo);
        let refs: Refs = ask(&self.at("main"), &address, None, Hops::Follow)?.json("refs")?;
        Ok(refs.branches.into_iter().chain(refs.tags).map(|named| named.name).collect())
    }

    /// What an answer means that is not the thing asked for.
    fn refusal(&self, answer: &Answer, file: &str) -> Error {
        let (repo, page, has_token) = (self.repo.clone(), self.page(), self.has_token);
        match (answer.status, answer.header("x-error-code").unwrap_or_default()) {
            (401 | 403, "GatedRepo") => Error::Gated { repo, page, has_token },
            (404, "EntryNotFound") => Error::NoFile { repo, file: file.to_owned() },
            (404, "RevisionNotFound") => {
                Error::NoRevision { repo, revision: String::new(), known: Vec::new() }
            }
            (404, _) | (401, "RepoNotFound") => Error::NoRepo { repo, has_token },
            (401 | 403, _) => Error::Unauthorized { repo, page, has_token },
            (429 | 500..600, _) => Error::Busy { status: answer.status },
            (status, _) => self.odd(file, &format!("status {status}")),
        }
    }

    fn odd(&self, what: &str, why: &str) -> Error {
        let what = format!("{}/{what}", self.repo).trim_end_matches('/').to_owned();
        Error::Answer { what, why: why.to_owned() }
    }
}

/// Whether redirects are followed.
#[derive(Clone, Copy, PartialEq)]
enum Hops {
    Follow,
    Stay,
}

/// A request, and those that it is sent on to. The token goes to no other scheme, host or port than the first.
fn ask(at: &ApiRepo, address: &str, range: Option<&str>, hops: Hops) -> Result<Answer, Error> {
    let home = origin(address);
    let mut answer = ask_once(at, address, range, true)?;
    let mut address = address.to_owned();
    for _ in 0..MAX_HOPS {
        let to = match answer.header("location") {
            Some(to) if hops == Hops::Follow && matches!(answer.status, 300..400) => to,
            _ => break,
        };
        address = match to.starts_with('/') && !to.starts_with("//") {
            true => format!("{}{to}", origin(&address)),
            false => to.to_owned(),
        };
        answer = ask_once(at, &address, range, origin(&address) == home)?;
    }
    Ok(answer)
}

/// Scheme, host and port of an address.
fn origin(address: &str) -> &str {
    let host = address.find("://").map_or(0, |scheme| scheme + 3);
    let end = address[host..].find(['/', '?', '#']);
    end.map_or(address, |end| &address[..host + end])
}

/// One request. Compressed answers are not asked for: a range counts bytes of the file.
fn ask_once(
    at: &ApiRepo,
    address: &str,
    range: Option<&str>,
    with_token: bool,
) -> Result<Answer, Error> {
    let mut request = at.info_request().uri(address).header("Accept-Encoding", "identity");
    if let Some(range) = range {
        request = request.header("Range", range);
    }
    if let Some(headers) = request.headers_mut().filter(|_| !with_token) {
        headers.remove("authorization");
    }
    let request = request
        .config()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .build();
    let response = request.call().map_err(|error| Error::Connection(error.to_string()))?;
    let (head, body) = response.into_parts();
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers = head.headers.iter();
    let headers =
        headers.map(|(name, value)| (name.as_str().to_owned(), text(value.as_bytes()))).collect();
    Ok(Answer { status: head.status.as_u16(), headers, body: Box::new(body.into_reader()) })
}

/// Fit to be a file name.
fn is_plain(etag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=128).contains(&etag.len()) && etag.bytes().all(plain)
}

//! Object store: large files in chunks, with progress, and a digest that is checked
//!
//! A message is at most 1 MB by default; an object is as many messages as it takes. Each chunk is acknowledged, and the
//! object appears when its description is stored, after all of them. Reading checks the SHA-256 digest, and here
//! nothing of a damaged object stays behind: the file gets its name when all of it is there.
//!
//! ```console
//! $ cargo lab run nats_object_store put film.bin 5000000
//! film.bin: 1 MB of 5 MB
//! ...
//! film.bin: stored, 5000000 bytes in [..] chunks, SHA-256=[..]
//! $ cargo lab run nats_object_store get film.bin copy.bin
//! film.bin: 1 MB of 5 MB
//! ...
//! film.bin: 5000000 bytes in copy.bin, the digest is right
//! $ cargo lab run nats_object_store list
//! film.bin: 5000000 bytes, modified [..]
//! $ cargo lab run nats_object_store get nothing.bin copy2.bin
//! [exit 1]
//! ```
//!
//! Notice: the digest shows an error only at the end, when everything has been handed out. So a reader must not act on
//! the first part before it has the last: this one writes to `copy.bin.part`. An upload that breaks off leaves chunks
//! that belong to no object; they stay until the bucket is deleted. Storing under a name that is taken replaces the
//! object, for new readers.
//!
//! Try: put a file of your own, by its path. Kill the program in the middle of a put: the object does not exist.
//!
//! Settings: NATS_URL (nats://localhost:4222); the arguments are `put PATH`, `put NAME BYTES` (generated), `get NAME
//! PATH` or `list`. See also: nats_kv.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream;
use async_nats::jetstream::object_store::{Config, GetErrorKind, ObjectMetadata, ObjectStore};
use futures::TryStreamExt;
use tokio::fs::{self, File};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, repeat};
use tokio::time::timeout;

const BUCKET: &str = "FILES";
const MB: u64 = 1_000_000;
const CHUNK: usize = 128 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://localhost:4222".into());
    let args: Vec<String> = std::env::args().skip(1).collect();
    let client = async_nats::connect(&url).await.with_context(|| {
        format!("cannot connect to NATS at {url}; `cargo lab up nats` starts a server")
    })?;
    let jetstream = jetstream::new(client);
    let store = match jetstream.get_object_store(BUCKET).await {
        Ok(store) => store,
        Err(_) => {
            let config = Config {
                bucket: BUCKET.into(),
                ..Default::default()
            };
            jetstream.create_object_store(config).await?
        }
    };
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["put", name, size] => {
            let size = size.parse().context("BYTES is a number")?;
            put(&store, name, size, repeat(b'x').take(size)).await
        }
        ["put", path] => {
            let file = File::open(path)
                .await
                .with_context(|| format!("cannot read {path}"))?;
            let size = file.metadata().await?.len();
            let name = Path::new(path).file_name().and_then(|name| name.to_str());
            put(
                &store,
                name.with_context(|| format!("{path} has no name"))?,
                size,
                file,
            )
            .await
        }
        ["get", name, path] => get(&store, name, path).await,
        ["list"] => list(&store).await,
        _ => bail!("usage: nats_object_store [put PATH | put NAME BYTES | get NAME PATH | list]"),
    }
}

async fn put(
    store: &ObjectStore,
    name: &str,
    size: u64,
    from: impl AsyncRead + Unpin,
) -> anyhow::Result<()> {
    let mut from = Watched {
        inner: from,
        progress: Progress::new(name, size),
    };
    let metadata = ObjectMetadata {
        name: name.to_owned(),
        chunk_size: Some(CHUNK),
        ..Default::default()
    };
    let info = store.put(metadata, &mut from).await;
    let info = info.with_context(|| format!("{name}: not stored"))?;
    println!(
        "{name}: stored, {} bytes in {} chunks, {}",
        info.size,
        info.chunks,
        info.digest.unwrap_or_default()
    );
    Ok(())
}

async fn get(store: &ObjectStore, name: &str, path: &str) -> anyhow::Result<()> {
    let mut object = match store.get(name).await {
        Ok(object) => object,
        Err(error) if error.kind() == GetErrorKind::NotFound => {
            bail!("there is no object {name}; `list` shows those that there are")
        }
        Err(error) => return Err(error).with_context(|| format!("{name}: cannot be read")),
    };
    let size = object.info().size as u64;
    let part = PathBuf::from(format!("{path}.part"));
    let received = receive(&mut object, &part, Progress::new(name, size)).await;
    let whole = received.and_then(|bytes| {
        ensure!(bytes == size, "{bytes} bytes came, and {size} should have");
        Ok(())
    });
    if let Err(error) = whole {
        fs::remove_file(&part).await.ok();
        return Err(error)
            .with_context(|| format!("{name}: damaged or incomplete, nothing is kept"));
    }
    fs::rename(&part, path).await?;
    println!("{name}: {size} bytes in {path}, the digest is right");
    Ok(())
}

async fn receive(
    object: &mut (impl AsyncRead + Unpin),
    part: &Path,
    mut progress: Progress,
) -> anyhow::Result<u64> {
    let mut file = File::create(part)
        .await
        .with_context(|| format!("cannot write {}", part.display()))?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    loop {
        // The client waits for chunks that are not there any more, and does so for ever.
        let count = timeout(PATIENCE, object.read(&mut buffer)).await;
        let count = count.context("the next chunk does not come")??;
        if count == 0 {
            break;
        }
        file.write_all(&buffer[..count]).await?;
        received += count as u64;
        progress.add(count as u64);
    }
    file.sync_all().await?;
    Ok(received)
}

async fn list(store: &ObjectStore) -> anyhow::Result<()> {
    let mut objects = store.list().await?;
    while let Some(object) = objects.try_next().await? {
        let modified = object
            .modified
            .map_or_else(|| "?".into(), |time| time.to_string());
        println!(
            "{}: {} bytes, modified {modified}",
            object.name, object.size
        );
    }
    Ok(())
}

struct Progress {
    name: String,
    done: u64,
    size: u64,
}

impl Progress {
    fn new(name: &str, size: u64) -> Progress {
        let name = name.to_owned();
        Progress {
            name,
            done: 0,
            size,
        }
    }

    fn add(&mut self, bytes: u64) {
        let before = self.done / MB;
        self.done += bytes;
        if self.done / MB > before {
            println!(
                "{}: {} MB of {} MB",
                self.name,
                self.done / MB,
                self.size / MB
            );
        }
    }
}

/// Counts what the client reads to send it.
struct Watched<R> {
    inner: R,
    progress: Progress,
}

impl<R: AsyncRead + Unpin> AsyncRead for Watched<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(poller, buffer);
        self.progress.add((buffer.filled().len() - before) as u64);
        polled
    }
}

//! The authorities that this machine trusts, in the file format in which Java reads them.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use sha1::{Digest, Sha1};

/// Java's well-known password for a file that holds nothing secret.
const PASSWORD: &str = "changeit";

/// Writes the machine's authorities as a key store. Java's own keytool would take half a second for each.
pub(super) fn write(path: &Path) -> Result<()> {
    let found = rustls_native_certs::load_native_certs();
    let certificates: Vec<&[u8]> = found.certs.iter().map(AsRef::as_ref).collect();
    let millis = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64);
    fs::write(path, encode(&certificates, millis))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The JKS format: a header, the entries, and a salted SHA-1 of it all.
fn encode(certificates: &[&[u8]], millis: u64) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u16).to_be_bytes());
        out.extend(text.as_bytes());
    }
    let mut out = Vec::new();
    out.extend(0xFEED_FEED_u32.to_be_bytes());
    out.extend(2_u32.to_be_bytes());
    out.extend((certificates.len() as u32).to_be_bytes());
    for (index, certificate) in certificates.iter().enumerate() {
        out.extend(2_u32.to_be_bytes()); // a trusted certificate, not a key
        text(&mut out, &format!("authority-{index}"));
        out.extend(millis.to_be_bytes());
        text(&mut out, "X.509");
        out.extend((certificate.len() as u32).to_be_bytes());
        out.extend(*certificate);
    }
    let mut digest = Sha1::new();
    for unit in PASSWORD.encode_utf16() {
        digest.update(unit.to_be_bytes());
    }
    digest.update(b"Mighty Aphrodite");
    digest.update(&out);
    out.extend(digest.finalize());
    out
}

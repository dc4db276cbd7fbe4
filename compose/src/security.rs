//! What a secured service needs: a certificate authority, certificates, and two users with a password each.
//!
//! It is made on first use. All of it can be read by its owner alone.

use std::fmt;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::OffsetDateTime;

/// Who connects to a secured listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// A service that sends and receives. It has the rights that this takes, and no more.
    Application,
    /// May do everything.
    Administrator,
}

impl User {
    /// Both.
    pub const ALL: [User; 2] = [User::Application, User::Administrator];
}

/// The user's name in every service.
impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            User::Application => "application",
            User::Administrator => "administrator",
        })
    }
}

/// Some systems trust no certificate that is valid for longer than 825 days.
const VALID: time::Duration = time::Duration::days(800);
/// When new ones are made.
const USED: Duration = Duration::from_secs(400 * 24 * 3600);

/// The name that the brokers' own certificate bears. They show it to each other too.
pub(crate) const BROKER: &str = "broker";

/// A folder with the certificates, keys and passwords of one service.
#[derive(Clone, Debug)]
pub(crate) struct Security {
    folder: PathBuf,
}

impl Security {
    /// The one in this folder. What is not there yet is made, and certificates that will soon expire are renewed: to be
    /// called by the process that is about to start the service, and by no other meanwhile.
    ///
    /// # Errors
    /// The folder cannot be written, or its path is not one that all configurations understand as it is.
    pub(crate) fn at(folder: PathBuf) -> Result<Security> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
        ensure!(
            folder
                .to_str()
                .is_some_and(|path| path.chars().all(is_plain)),
            "a secured broker cannot have its certificates in '{}', which has other signs than letters, digits and \
             /._-+@ in it: set LAB_HOME to another folder",
            folder.display()
        );
        let security = Security { folder };
        create_private_folder(&security.folder)?;
        for user in User::ALL {
            make_once(security.path(&format!("{user}.password")), |new| {
                write(new, &random_word()?)
            })?;
        }
        let certificates = PathBuf::from(security.path("certificates"));
        let made = certificates.metadata().and_then(|folder| folder.modified());
        let age = made.ok().and_then(|made| made.elapsed().ok());
        if age.is_some_and(|age| age > USED) {
            // In one piece: what is there must be whole.
            let old = tempfile::tempdir_in(&security.folder)
                .with_context(|| format!("cannot write to {}", security.folder.display()))?;
            fs::rename(&certificates, old.path().join("certificates"))
                .with_context(|| format!("cannot move {}", certificates.display()))?;
        }
        make_once(&certificates, make_certificates)?;
        Ok(security)
    }

    /// The path of the certificate of the authority that has signed all others.
    pub(crate) fn ca(&self) -> String {
        self.path("certificates/ca.pem")
    }

    /// The path of the certificate that bears this name, that of a user or [`BROKER`].
    pub(crate) fn certificate(&self, name: impl fmt::Display) -> String {
        self.path(&format!("certificates/{name}.pem"))
    }

    /// The path of the private key of that certificate, in PKCS#8.
    pub(crate) fn key(&self, name: impl fmt::Display) -> String {
        self.path(&format!("certificates/{name}.key"))
    }

    pub(crate) fn password(&self, user: User) -> Result<String> {
        self.secret(&format!("{user}.password"))
    }

    /// What is in one of the files.
    pub(crate) fn secret(&self, file: &str) -> Result<String> {
        read(self.path(file))
    }

    /// The path of a file, whether it is there or not. It has no sign in it that a configuration or a shell would take
    /// for something else.
    pub(crate) fn path(&self, file: &str) -> String {
        format!("{}/{file}", self.folder.display())
    }

    /// As a shell is told it: a secret is read from its file, so that it is neither shown nor kept in a history.
    pub(crate) fn for_shell(&self, value: &str) -> Result<String> {
        let mut text = value.to_owned();
        let files = fs::read_dir(&self.folder)
            .with_context(|| format!("cannot read {}", self.folder.display()))?;
        for file in files {
            let path = file?.path();
            if SECRETS
                .iter()
                .any(|end| path.extension() == Some(end.as_ref()))
            {
                text = text.replace(&read(&path)?, &format!("$(cat '{}')", path.display()));
            }
        }
        Ok(text)
    }
}

/// The endings of files that hold one secret and nothing else.
const SECRETS: [&str; 3] = ["password", "token", "seed"];

/// The password or token of an address is for programs, not for a screen or a log. That of RabbitMQ's `guest` is known to
/// everybody.
pub(crate) fn without_password(addresses: &str) -> String {
    let mut parts = addresses.split("://");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str("://");
        match part.rsplit_once('@') {
            Some((login, host)) if login != "guest:guest" => {
                let (user, _) = login.split_once(':').unwrap_or_default();
                text.push_str(&format!("{user}:…@{host}"));
            }
            _ => text.push_str(part),
        }
    }
    text
}

/// What is in a file.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file that only its owner can read.
pub(crate) fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    // A file that is there keeps its mode.
    let _ = fs::remove_file(path);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Makes a folder that only its owner can look into. One that is there becomes such a folder.
pub(crate) fn create_private_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o700)))
        .with_context(|| format!("cannot create {}", path.display()))
}

/// Makes it beside its place and moves it there when it is whole.
pub(crate) fn make_once(
    path: impl AsRef<Path>,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    if path.exists() {
        return Ok(());
    }
    let name = path.file_name().context("a path without a name")?;
    let folder = path.parent().context("a path without a folder")?;
    let beside = tempfile::tempdir_in(folder)
        .with_context(|| format!("cannot write to {}", folder.display()))?;
    let new = beside.path().join(name);
    make(&new)?;
    fs::rename(&new, path).with_context(|| format!("cannot make {}", path.display()))
}

/// Letters and digits that nobody can guess.
pub(crate) fn random_word() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("the system has no random numbers")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The authority's own key is not kept: it has signed all that it will ever sign.
fn make_certificates(folder: &Path) -> Result<()> {
    create_private_folder(folder)?;
    let mut authority = named("messaging-lab")?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    write(folder.join("ca.pem"), &authority.self_signed(&key)?.pem())?;
    let authority = Issuer::new(authority, key);

    let users = User::ALL.map(|user| user.to_string());
    for name in [BROKER].into_iter().chain(users.iter().map(String::as_str)) {
        let mut params = named(name)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if name == BROKER {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &authority)?;
        write(folder.join(format!("{name}.pem")), &certificate.pem())?;
        write(folder.join(format!("{name}.key")), &key.serialize_pem())?;
    }
    Ok(())
}

fn named(name: &str) -> Result<CertificateParams> {
    let hosts = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    // Clocks differ.
    params.not_before = now - time::Duration::days(1);
    params.not_after = now + VALID;
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::all_in;

    #[test]
    fn only_the_owner_can_read_what_is_made_and_it_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("secure");
        let read = || {
            Security::at(folder.clone()).unwrap();
            let files = all_in(&folder).unwrap();
            assert!(files.len() >= 9, "{files:?}");
            let read = files.iter().map(|file| {
                let mode = file.metadata().unwrap().permissions().mode();
                assert_eq!(mode & 0o077, 0, "{}: {mode:o}", file.display());
                fs::read(file).unwrap()
            });
            read.collect::<Vec<_>>()
        };
        let first = read();
        assert_eq!(first, read());
        for path in [&folder, &folder.join("certificates")] {
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
        }
    }

    #[test]
    fn certificates_are_renewed_before_they_expire_and_passwords_stay() {
        let folder = tempfile::tempdir().unwrap();
        let at = || {
            let security = Security::at(folder.path().to_owned()).unwrap();
            let ca = fs::read(security.ca()).unwrap();
            (ca, security.password(User::Administrator).unwrap())
        };
        let first = at();
        let long_ago = std::time::SystemTime::now() - USED - Duration::from_secs(1);
        let certificates = fs::File::open(folder.path().join("certificates")).unwrap();
        certificates.set_modified(long_ago).unwrap();
        let second = at();
        assert_ne!(first.0, second.0);
        assert_eq!(first.1, second.1);
    }

    #[test]
    fn a_secret_is_shown_as_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let security = Security::at(folder.path().to_owned()).unwrap();
        let password = security.password(User::Application).unwrap();
        let shown = security.for_shell(&format!("amqps://application:{password}@localhost"));
        let file = security.path("application.password");
        let expected = format!("amqps://application:$(cat '{file}')@localhost");
        assert_eq!(shown.unwrap(), expected);
    }

    #[test]
    fn a_path_that_a_configuration_would_misread_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Security::at(folder.path().join("my folder")).unwrap_err();
        assert!(error.to_string().contains("set LAB_HOME"), "{error}");
    }

    #[test]
    fn a_password_in_an_address_is_hidden() {
        for (address, shown) in [
            (
                "amqp://application:s3cret@localhost:5672/lab",
                "amqp://application:…@localhost:5672/lab",
            ),
            (
                "nats://a:p,w@one:4222,nats://b:p@w@two:4222",
                "nats://a:…@one:4222,nats://b:…@two:4222",
            ),
            ("nats://token@one:4222", "nats://:…@one:4222"),
            ("amqp://guest:mine@one", "amqp://guest:…@one"),
        ] {
            assert_eq!(without_password(address), shown);
        }
        for plain in [
            "amqp://guest:guest@127.0.0.1:5672/%2f",
            "127.0.0.1:9092,127.0.0.1:9093",
            "nats://127.0.0.1:4222",
        ] {
            assert_eq!(without_password(plain), plain);
        }
    }
}

//! Credentials for S3: environment, then profile files, then the instance's metadata service, version 2. It
//! finds and refreshes them and says where they came from; it never writes them anywhere, and nothing it
//! prints holds a secret.

use crate::clock::Timestamp;
use crate::http::{self, Limits, Trouble};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A shared way to read the environment.
pub type Env = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Where credentials came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `AWS_ACCESS_KEY_ID` and its companions.
    Environment,
    /// A profile of a file.
    Profile {
        /// The profile's name.
        name: String,
        /// The file that has its keys.
        file: PathBuf,
    },
    /// The role of the instance.
    Instance {
        /// The role's name.
        role: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Environment => f.write_str("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
            Source::Profile { name, file } => write!(f, "profile '{name}' in {}", file.display()),
            Source::Instance { role } => write!(f, "the instance's role '{role}'"),
        }
    }
}

/// A key to sign with.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The access key's id; not secret.
    pub id: String,
    /// The secret access key.
    pub secret: String,
    /// The session token of temporary credentials.
    pub token: Option<String>,
    /// When they stop working, if they do.
    pub expires: Option<Timestamp>,
    /// Where they came from.
    pub source: Source,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Credentials { id, secret: _, token: _, expires, source } = self;
        f.debug_struct("Credentials")
            .field("id", id)
            .field("expires", expires)
            .field("source", source)
            .finish_non_exhaustive()
    }
}

/// Credentials that end within this time are looked up again.
const REFRESH_SEC: i64 = 300;

/// The metadata service is on the link itself: what does not answer at once is not there.
const METADATA_LIMITS: Limits = Limits {
    connect: Duration::from_secs(1),
    answer: Duration::from_secs(2),
    total: Some(Duration::from_secs(3)),
    stall: Duration::from_secs(2),
};

const METADATA: &str = "http://169.254.169.254";

/// Finds credentials, keeps them, and finds them again before they end.
pub struct Provider {
    env: Env,
    profile: Option<String>,
    found: Mutex<Option<Arc<Credentials>>>,
}

impl Provider {
    /// Looks in `env`, and for `profile` (else `AWS_PROFILE`, else `default`) in the files.
    pub fn new(env: Env, profile: Option<&str>) -> Self {
        Provider { env, profile: profile.map(str::to_string), found: Mutex::default() }
    }

    /// The credentials of now. The error says what was tried, and what to do.
    pub fn get(&self, now: Timestamp) -> Result<Arc<Credentials>, String> {
        // Held while looking: several threads that need new credentials ask for them once.
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let left = |c: &Credentials| c.expires.map_or(i64::MAX, |at| at.0 - now.0);
        if let Some(kept) = found.as_ref()
            && left(kept) > REFRESH_SEC
        {
            return Ok(kept.clone());
        }
        match (self.look(), found.as_ref()) {
            (Ok(new), _) => Ok(found.insert(Arc::new(new)).clone()),
            (Err(_), Some(kept)) if left(kept) > 0 => Ok(kept.clone()),
            (Err(why), _) => Err(why),
        }
    }

    /// The region of the profile, if it has one.
    pub fn region(&self) -> Option<String> {
        let name = self.profile_name();
        [self.config_file(), self.credentials_file()]
            .iter()
            .find_map(|file| read_profile(file, &name).ok().flatten()?.remove("region"))
    }

    fn var(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|v| !v.is_empty())
    }

    fn profile_name(&self) -> String {
        self.profile.clone().or_else(|| self.var("AWS_PROFILE")).unwrap_or_else(|| "default".into())
    }

    fn file(&self, variable: &str, name: &str) -> PathBuf {
        let home = || self.var("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
        self.var(variable).map_or_else(|| home().join(".aws").join(name), PathBuf::from)
    }

    fn credentials_file(&self) -> PathBuf {
        self.file("AWS_SHARED_CREDENTIALS_FILE", "credentials")
    }

    fn config_file(&self) -> PathBuf {
        self.file("AWS_CONFIG_FILE", "config")
    }

    fn look(&self) -> Result<Credentials, String> {
        match (self.var("AWS_ACCESS_KEY_ID"), self.var("AWS_SECRET_ACCESS_KEY")) {
            (Some(id), Some(secret)) => {
                let token = self.var("AWS_SESSION_TOKEN");
                return Ok(Credentials { id, secret, token, expires: None, source: Source::Environment });
            }
            (Some(_), None) => {
                return Err(
                    "AWS_ACCESS_KEY_ID is set but AWS_SECRET_ACCESS_KEY is not; set both or none".into()
                );
            }
            (None, Some(_)) => {
                return Err(
                    "AWS_SECRET_ACCESS_KEY is set but AWS_ACCESS_KEY_ID is not; set both or none".into()
                );
            }
            (None, None) => {}
        }
        let name = self.profile_name();
        let mut tried = vec!["AWS_ACCESS_KEY_ID is not set".to_string()];
        for file in [self.credentials_file(), self.config_file()] {
            match read_profile(&file, &name)? {
                None => tried.push(format!("no profile '{name}' in {}", file.display())),
                Some(settings) => match of_profile(settings, &name, &file)? {
                    Some(credentials) => return Ok(credentials),
                    None => tried.push(format!("no keys in profile '{name}' of {}", file.display())),
                },
            }
        }
        match self.of_instance() {
            Ok(credentials) => Ok(credentials),
            Err(why) => Err(format!(
                "no credentials: {}, {why}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or put them in {}",
                tried.join(", "),
                self.credentials_file().display()
            )),
        }
    }

    /// The role's credentials from the instance's metadata service, version 2 (Amazon EC2 user guide,
    /// "Use the Instance Metadata Service"): a token by PUT, then the role's name, then its keys.
    fn of_instance(&self) -> Result<Credentials, String> {
        if self.var("AWS_EC2_METADATA_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return Err("instance metadata is turned off by AWS_EC2_METADATA_DISABLED".into());
        }
        let base = self.var("AWS_EC2_METADATA_SERVICE_ENDPOINT").unwrap_or_else(|| METADATA.into());
        let base = base.trim_end_matches('/');
        let what = |why: String| format!("no instance metadata at {base} ({why})");
        // Never through a proxy: a proxy's own role is not ours.
        let agent = http::agent(&|_| None, "http", "", METADATA_LIMITS)?;
        let ask = |request: ureq::http::request::Builder| -> Result<String, String> {
            let request = request.body(()).map_err(|e| what(e.to_string()))?;
            let path = request.uri().path().to_string();
            let response = agent.run(request).map_err(|e| what(Trouble::from(e).to_string()))?;
            let status = response.status().as_u16();
            if status != 200 {
                return Err(what(format!("{path} answers {status}")));
            }
            let mut text = String::new();
            let body = response.into_body().into_reader().take(64 << 10).read_to_string(&mut text);
            body.map_err(|e| what(Trouble::of_body(e).to_string()))?;
            Ok(text)
        };
        let token = ask(ureq::http::Request::put(format!("{base}/latest/api/token"))
            .header("X-aws-ec2-metadata-token-ttl-seconds", "21600"))?;
        let get = |path: &str| {
            ask(ureq::http::Request::get(format!("{base}/latest/meta-data/iam/security-credentials/{path}"))
                .header("X-aws-ec2-metadata-token", token.trim()))
        };
        let role = get("")?.lines().next().unwrap_or_default().trim().to_string();
        if role.is_empty() {
            return Err(what("the instance has no role".into()));
        }
        let found: InstanceCredentials = serde_json::from_str(&get(&role)?)
            // serde's text would quote the answer, which may hold the secret.
            .map_err(|_| what(format!("what it says of role '{role}' is not understood")))?;
        Ok(Credentials {
            id: found.access_key_id,
            secret: found.secret_access_key,
            token: found.token,
            expires: found.expiration.as_deref().and_then(Timestamp::parse),
            source: Source::Instance { role },
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InstanceCredentials {
    access_key_id: String,
    secret_access_key: String,
    token: Option<String>,
    expiration: Option<String>,
}

fn of_profile(
    mut settings: BTreeMap<String, String>,
    name: &str,
    file: &Path,
) -> Result<Option<Credentials>, String> {
    let place = || format!("profile '{name}' in {}", file.display());
    match (settings.remove("aws_access_key_id"), settings.remove("aws_secret_access_key")) {
        (Some(id), Some(secret)) => Ok(Some(Credentials {
            id,
            secret,
            token: settings.remove("aws_session_token"),
            expires: None,
            source: Source::Profile { name: name.into(), file: file.into() },
        })),
        (Some(_), None) => Err(format!("{} has no aws_secret_access_key; add it", place())),
        (None, Some(_)) => Err(format!("{} has no aws_access_key_id; add it", place())),
        (None, None) => {
            let indirect = |k: &&String| {
                k.starts_with("sso_")
                    || matches!(k.as_str(), "role_arn" | "credential_process" | "source_profile")
            };
            match settings.keys().find(indirect) {
                None => Ok(None),
                Some(key) => Err(format!(
                    "{} has {key}, which is not followed here; run \
                     'eval \"$(aws configure export-credentials --profile {name} --format env)\"' first",
                    place()
                )),
            }
        }
    }
}

/// The settings of one profile; None when the file or the profile is not there. In the configuration file
/// profiles other than `default` are headed `[profile NAME]`, in the credentials file `[NAME]` (AWS CLI user
/// guide, "Configuration and credential file settings"); both forms are read in both.
fn read_profile(file: &Path, name: &str) -> Result<Option<BTreeMap<String, String>>, String> {
    let text = match fs_err::read_to_string(file) {
        Ok(text) => text,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(crate::error::io_text(&e)),
    };
    let mut found: Option<BTreeMap<String, String>> = None;
    let mut inside = false;
    for line in text.lines() {
        if line.trim().is_empty() || line.trim_start().starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = line.trim().strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default().trim();
            let header = match header.split_once(char::is_whitespace) {
                Some(("profile", name)) => name.trim().trim_matches(['"', '\'']),
                _ => header,
            };
            inside = header == name;
            if inside {
                found.get_or_insert_default();
            }
            continue;
        }
        // An indented line is a setting below the one before it (`s3 =` and what belongs to it).
        if let Some(settings) = found.as_mut().filter(|_| inside && !line.starts_with(char::is_whitespace))
            && let Some((key, value)) = line.split_once('=')
            && !value.trim().is_empty()
        {
            settings.insert(key.trim().to_ascii_lowercase(), value.trim().to_string());
        }
    }
    Ok(found)
}

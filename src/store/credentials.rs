//! Credentials for S3: environment, then profile files, then the instance's metadata service, version 2. It
//! finds and refreshes them and says where they came from; it never writes them anywhere, and nothing it
//! prints holds a secret.

use crate::clock::Timestamp;
use crate::files::if_reached;
use crate::http::{self, HttpLimits, TransferError};
use crate::parallel::locked;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A shared way to read the environment.
pub type Env = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

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
    /// Where they came from, for people: variables, the profile of a file, or the instance's role.
    pub source: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The files in which this user's credentials are looked for, whether they are there or not.
pub fn files() -> [PathBuf; 2] {
    let provider = Provider::new(Arc::new(crate::http::process_env), None);
    [provider.credentials_file(), provider.config_file()]
}

/// Credentials that end within this time are looked up again.
const REFRESH_SEC: i64 = 300;

/// What was not found is not looked for again before this time, in seconds: of a service that does not answer, each of
/// many requests would wait for the one before it.
const AGAIN_SEC: i64 = 10;

/// The metadata service is on the link itself: what does not answer at once is not there.
const METADATA_LIMITS: HttpLimits = HttpLimits {
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
    found: Mutex<LookupCache>,
}

/// What came of looking.
#[derive(Default)]
struct LookupCache {
    kept: Option<Arc<Credentials>>,
    /// When nothing was found last, and why.
    failed: Option<(Timestamp, String)>,
}

impl Provider {
    /// Looks in `env`, and for `profile` (else `AWS_PROFILE`, else `default`) in the files.
    pub fn new(env: Env, profile: Option<&str>) -> Self {
        Provider { env, profile: profile.map(str::to_string), found: Mutex::default() }
    }

    /// The credentials of now. The error says what was tried, and what to do.
    pub fn get(&self, now: Timestamp) -> Result<Arc<Credentials>, String> {
        // Held while looking: several threads that need new credentials ask for them once.
        let mut found = locked(&self.found);
        let left = |c: &Credentials| c.expires.map_or(i64::MAX, |at| at.0 - now.0);
        if let Some(kept) = &found.kept
            && left(kept) > REFRESH_SEC
        {
            return Ok(kept.clone());
        }
        let just_failed =
            |(at, _): &&(Timestamp, String)| (0..AGAIN_SEC).contains(&now.0.saturating_sub(at.0));
        let looked = match found.failed.as_ref().filter(just_failed) {
            Some((_, why)) => Err(why.clone()),
            None => self.look().inspect_err(|why| found.failed = Some((now, why.clone()))),
        };
        match (looked, &found.kept) {
            (Ok(new), _) => Ok(found.kept.insert(Arc::new(new)).clone()),
            (Err(_), Some(kept)) if left(kept) > 0 => Ok(kept.clone()),
            (Err(why), _) => Err(why),
        }
    }

    /// A setting of the profile that is no key, and the file that has it.
    fn setting(&self, name: &str) -> Option<(String, PathBuf)> {
        let profile = self.profile_name();
        [self.config_file(), self.credentials_file()]
            .into_iter()
            .find_map(|file| Some((read_profile(&file, &profile).ok().flatten()?.remove(name)?, file)))
    }

    /// The region if the store's URL does not say: that of the environment, or of the profile.
    pub fn region(&self) -> Option<String> {
        self.var("AWS_REGION")
            .or_else(|| self.var("AWS_DEFAULT_REGION"))
            .or_else(|| self.setting("region").map(|(region, _)| region))
    }

    /// Where the store is if its URL does not say, and what names it: the environment or the profile (AWS SDKs and
    /// tools reference guide, "Service-specific endpoints"; sections of `services` are not read).
    pub fn endpoint(&self) -> Option<(String, String)> {
        let ignored = self.var("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS");
        if ignored.is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return None;
        }
        let named = |name: &str| Some((self.var(name)?, name.to_string()));
        named("AWS_ENDPOINT_URL_S3").or_else(|| named("AWS_ENDPOINT_URL")).or_else(|| {
            let (url, file) = self.setting("endpoint_url")?;
            Some((url, format!("endpoint_url of profile '{}' in {}", self.profile_name(), file.display())))
        })
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
        let half = |is: &str, is_not: &str| Err(format!("{is} is set but {is_not} is not; set both or none"));
        let (id, secret) = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY");
        match (self.var(id), self.var(secret)) {
            (Some(id), Some(secret)) => {
                let token = self.var("AWS_SESSION_TOKEN");
                let source = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".into();
                return Ok(Credentials { id, secret, token, expires: None, source });
            }
            (Some(_), None) => return half(id, secret),
            (None, Some(_)) => return half(secret, id),
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
        self.of_instance().map_err(|why| {
            format!(
                "no credentials: {}, {why}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or put them in {}",
                tried.join(", "),
                self.credentials_file().display()
            )
        })
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
        let agent = http::local_agent(METADATA_LIMITS);
        let ask = |request: ureq::http::request::Builder| -> Result<String, String> {
            let request = request.body(()).map_err(|e| what(e.to_string()))?;
            let path = request.uri().path().to_string();
            let response = agent.run(request).map_err(|e| what(TransferError::from(e).to_string()))?;
            let status = response.status().as_u16();
            if status != 200 {
                return Err(what(format!("{path} answers {status}")));
            }
            let mut text = String::new();
            let body = response.into_body().into_reader().take(64 << 10).read_to_string(&mut text);
            body.map_err(|e| what(TransferError::of_body(e).to_string()))?;
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
            source: format!("the instance's role '{role}'"),
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
    let place = format!("profile '{name}' in {}", file.display());
    match (settings.remove("aws_access_key_id"), settings.remove("aws_secret_access_key")) {
        (Some(id), Some(secret)) => Ok(Some(Credentials {
            id,
            secret,
            token: settings.remove("aws_session_token"),
            expires: None,
            source: place,
        })),
        (Some(_), None) => Err(format!("{place} has no aws_secret_access_key; add it")),
        (None, Some(_)) => Err(format!("{place} has no aws_access_key_id; add it")),
        (None, None) => {
            let indirect = |k: &&String| {
                k.starts_with("sso_")
                    || matches!(k.as_str(), "role_arn" | "credential_process" | "source_profile")
            };
            match settings.keys().find(indirect) {
                None => Ok(None),
                Some(key) => Err(format!(
                    "{place} has {key}, which is not followed here; run \
                     'eval \"$(aws configure export-credentials --profile {name} --format env)\"' first"
                )),
            }
        }
    }
}

/// The settings of one profile; None when the file or the profile is not there. In the configuration file
/// profiles other than `default` are headed `[profile NAME]`, in the credentials file `[NAME]` (AWS CLI user
/// guide, "Configuration and credential file settings"); both forms are read in both.
fn read_profile(file: &Path, name: &str) -> Result<Option<BTreeMap<String, String>>, String> {
    let text = if_reached(fs_err::read_to_string(file)).map_err(|e| crate::error::io_text(&e))?;
    let Some(text) = text else { return Ok(None) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    fn provider(profile: Option<&str>, vars: &[(&str, &str)]) -> Provider {
        let vars: BTreeMap<String, String> =
            vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Provider::new(Arc::new(move |name| vars.get(name).cloned()), profile)
    }

    fn home() -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir(dir.path().join(".aws")).unwrap();
        let text = "# ours\n[default]\naws_access_key_id = D\naws_secret_access_key = ds\n\n\
                    [ work ]\nAWS_ACCESS_KEY_ID=W\naws_secret_access_key=w=s=\naws_session_token = wt\n\
                    [half]\naws_access_key_id = H\n";
        fs_err::write(dir.path().join(".aws/credentials"), text).unwrap();
        let text = "[default]\nregion = eu-default\n[profile work]\nregion=eu-work\ns3 =\n  \
                    region = nested\n[profile sso]\nsso_start_url = https://x\n\
                    [profile inline]\naws_access_key_id = I\naws_secret_access_key = is\n";
        fs_err::write(dir.path().join(".aws/config"), text).unwrap();
        let home = dir.path().display().to_string();
        (dir, home)
    }

    const OFF: (&str, &str) = ("AWS_EC2_METADATA_DISABLED", "true");

    #[test]
    fn the_environment_comes_first_then_the_profile() {
        let (_dir, home) = home();
        let keys = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "es")];
        let found = provider(Some("work"), &[("HOME", &home), keys[0], keys[1]]).get(Timestamp(0)).unwrap();
        let variables = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
        assert_eq!((found.id.as_str(), found.source.as_str()), ("E", variables));
        for (profile, var, id, secret, token) in [
            (None, None, "D", "ds", None),
            (Some("work"), None, "W", "w=s=", Some("wt")),
            (None, Some("work"), "W", "w=s=", Some("wt")),
            (Some("inline"), Some("work"), "I", "is", None),
        ] {
            let provider = provider(profile, &[("HOME", &home), ("AWS_PROFILE", var.unwrap_or("")), OFF]);
            let found = provider.get(Timestamp(0)).unwrap();
            let got = (found.id.as_str(), found.secret.as_str(), found.token.as_deref());
            assert_eq!(got, (id, secret, token), "{profile:?} {var:?}");
            assert!(found.source.contains(&format!("' in {home}/.aws/")), "{}", found.source);
        }
    }

    #[test]
    fn the_region_is_the_profiles_own() {
        let (_dir, home) = home();
        for (profile, region) in
            [(None, Some("eu-default")), (Some("work"), Some("eu-work")), (Some("sso"), None)]
        {
            assert_eq!(provider(profile, &[("HOME", &home)]).region().as_deref(), region, "{profile:?}");
        }
    }

    #[test]
    fn what_is_missing_is_said_with_what_was_tried() {
        let (_dir, home) = home();
        let id = ("AWS_ACCESS_KEY_ID", "AKID");
        for (profile, vars, parts) in [
            (None, vec![id], vec!["AWS_SECRET_ACCESS_KEY is not"]),
            (Some("half"), vec![], vec!["'half'", "/credentials", "no aws_secret_access_key"]),
            (Some("sso"), vec![], vec!["'sso'", "sso_start_url", "export-credentials --profile sso"]),
            (
                Some("nobody"),
                vec![],
                vec![
                    "AWS_ACCESS_KEY_ID is not set",
                    "'nobody'",
                    "/credentials",
                    "/config",
                    "METADATA_DISABLED",
                ],
            ),
        ] {
            let vars: Vec<_> = vars.into_iter().chain([("HOME", home.as_str()), OFF]).collect();
            let error = provider(profile, &vars).get(Timestamp(0)).unwrap_err();
            assert!(parts.iter().all(|p| error.contains(p)), "{error}");
            assert!(!error.contains('\n') && !error.contains("AKID"), "{error}");
        }
    }

    /// A metadata service that answers each request with the next of `answers`; its requests come back.
    fn metadata(answers: Vec<String>) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for answer in answers {
                let (mut socket, _) = listener.accept().unwrap();
                let mut head = String::new();
                let mut reader = BufReader::new(socket.try_clone().unwrap());
                while reader.read_line(&mut head).unwrap() > 2 {}
                asked.push(head);
                let length = answer.len();
                write!(
                    socket,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{answer}"
                )
                .unwrap();
            }
            asked
        });
        (base, thread)
    }

    fn role(id: &str, expires: &str) -> Vec<String> {
        let keys = format!(
            r#"{{"Code":"Success","AccessKeyId":"{id}","SecretAccessKey":"is","Token":"it","Expiration":"{expires}"}}"#
        );
        vec!["the-token".into(), "biz-role\n".into(), keys]
    }

    #[test]
    fn an_instances_role_is_asked_for_by_version_2_and_again_before_its_keys_end() {
        let mut answers = role("ONE", "1970-01-01T01:00:00Z");
        answers.extend(role("TWO", "1970-01-01T02:00:00Z"));
        let (base, thread) = metadata(answers);
        let (dir, _) = home();
        let empty = dir.path().join("nobody").display().to_string();
        let provider = provider(None, &[("HOME", &empty), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", &base)]);
        let found = provider.get(Timestamp(0)).unwrap();
        assert_eq!((found.id.as_str(), found.token.as_deref()), ("ONE", Some("it")));
        assert_eq!(found.source, "the instance's role 'biz-role'");
        assert_eq!(found.expires, Some(Timestamp(3600)));
        assert_eq!(provider.get(Timestamp(3000)).unwrap().id, "ONE", "kept while it lasts");
        assert_eq!(provider.get(Timestamp(3400)).unwrap().id, "TWO", "looked up before it ends");
        let asked = thread.join().unwrap();
        assert!(asked[0].starts_with("PUT /latest/api/token "), "{}", asked[0]);
        assert!(asked[0].to_lowercase().contains("x-aws-ec2-metadata-token-ttl-seconds: 21600"));
        assert!(asked[2].contains("/iam/security-credentials/biz-role "), "{}", asked[2]);
        assert!(asked[1..3].iter().all(|a| a.to_lowercase().contains("x-aws-ec2-metadata-token: the-token")));
        // The service is gone now: what is kept serves to its end and no longer.
        assert_eq!(provider.get(Timestamp(7100)).unwrap().id, "TWO");
        let error = provider.get(Timestamp(7200)).unwrap_err();
        assert!(error.contains(&base) && error.contains("connection refused"), "{error}");
    }

    #[test]
    fn many_requests_do_not_wait_one_after_the_other_for_a_service_that_gives_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        // Nobody accepts: each look takes as long as an answer may.
        let vars = [("HOME", "/nonexistent"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", base.as_str())];
        let provider = provider(None, &vars);
        let asked = || std::iter::from_fn(|| listener.accept().ok()).count();
        let first = provider.get(Timestamp(100)).unwrap_err();
        assert_eq!(asked(), 1);
        for now in [100, 101, 109] {
            assert_eq!(provider.get(Timestamp(now)).unwrap_err(), first);
        }
        assert_eq!(asked(), 0);
        provider.get(Timestamp(110)).unwrap_err();
        // Of a clock that was set back nothing is concluded.
        provider.get(Timestamp(90)).unwrap_err();
        assert_eq!(asked(), 2);
    }

    #[test]
    fn nothing_secret_is_printed() {
        let keys = [
            ("AWS_ACCESS_KEY_ID", "AKID"),
            ("AWS_SECRET_ACCESS_KEY", "hush"),
            ("AWS_SESSION_TOKEN", "hush2"),
        ];
        let text = format!("{:?}", provider(None, &keys).get(Timestamp(0)).unwrap());
        assert!(text.contains("AKID") && !text.contains("hush"), "{text}");
        let answers = vec!["t".into(), "r".into(), r#"{"SecretAccessKey": "hush"}"#.into()];
        let (base, thread) = metadata(answers);
        let vars = [("HOME", "/nonexistent"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", base.as_str())];
        let error = provider(None, &vars).get(Timestamp(0)).unwrap_err();
        thread.join().unwrap();
        assert!(error.contains("role 'r'") && !error.contains("hush"), "{error}");
    }
}

//! Entries of the manifest made of bytes: the same bytes always give the same entry, no bytes a plain one. Most
//! of what comes out is valid and hard to write down (blanks, quotes, specifiers, anything Unicode has); some of
//! it is not valid, which is for the parser to find. Needs nothing but serde_json: tests/host/units.rs has this
//! file too, to hand the same entries to a systemd.

use serde_json::{Map, Value, json};

/// Bytes as a row of decisions; when they are used up, every further one is 0.
#[derive(Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Decisions from these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Choices(bytes)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number below `n`, which is at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    /// Yes once in `n` times; no when the bytes are used up.
    pub fn rarely(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Up to `most` (at most 255) bytes as they are.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let length = self.below(most + 1).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    /// What is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |n, _| n << 8 | u64::from(self.byte()))
    }

    /// Any text, mostly without control characters.
    pub fn text(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..self.below(8) {
            match self.below(4) {
                0 => text.push_str(&String::from_utf8_lossy(self.take(12))),
                1 => text.extend(char::from_u32(self.number(3) as u32)),
                _ => text.push_str(self.pick(&PIECES)),
            }
        }
        if self.rarely(128) {
            text = text.repeat(1 + self.below(50));
        }
        if !self.rarely(16) {
            text.retain(|c| !c.is_control() || c == '\t');
        }
        text
    }

    /// A text of these characters, or now and then any.
    fn of(&mut self, characters: &str, most: usize) -> String {
        if self.rarely(24) {
            return self.text();
        }
        let characters = characters.as_bytes();
        let length = self.below(most + 1);
        (0..length).map(|_| char::from(self.pick(characters))).collect()
    }

    /// Some of these, or now and then something like them.
    fn some(&mut self, from: &[&str], characters: &str) -> Vec<String> {
        (0..self.below(4))
            .map(|_| if self.rarely(6) { self.of(characters, 30) } else { self.pick(from).to_string() })
            .collect()
    }

    fn path(&mut self) -> String {
        let mut path: String =
            (0..1 + self.below(4)).map(|_| format!("/{}", self.of("abzAZ019-_.+@:,=~/", 12))).collect();
        if self.rarely(32) {
            path.push_str(&format!("/{}", "n".repeat(200 + self.below(120))));
        }
        path
    }
}

/// What somebody's syntax takes for its own: units', shells', JSON's, terminals'.
const PIECES: [&str; 64] = [
    "a",
    " ",
    "  ",
    "\t",
    "%",
    "%%",
    "%n",
    "%H",
    "100%",
    "$",
    "$$",
    "$HOME",
    "${HOME}",
    "$(id)",
    "`id`",
    "\\",
    "\\\\",
    "\\x41",
    "\\n",
    "\\u0041",
    "\\101",
    "\"",
    "'",
    "''",
    "\"\"",
    ";",
    " ; ",
    "#",
    "# x",
    "=",
    "a=b",
    "-",
    "@",
    "+",
    "!",
    ":",
    "|",
    "&",
    ">",
    "*",
    "?",
    "~",
    "{",
    "}",
    "[Service]",
    "ExecStart=/bin/false",
    "é",
    "ñandú",
    "🚀",
    "\u{202e}",
    "\u{200b}",
    "\u{feff}",
    "\u{2028}",
    "\u{a0}",
    "\u{fffd}",
    "\u{fdd0}",
    "\u{fffe}",
    "\u{10ffff}",
    "\n",
    "\r",
    "\0",
    "\u{1b}[2J",
    "\u{85}",
    "\u{7f}",
];

const HASH: &str = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd";

/// An entry as JSON, and what is known of what it means.
#[derive(Debug)]
pub struct Entry {
    /// The JSON.
    pub value: Value,
    /// The words of its command, if it was made of words.
    pub words: Option<Vec<String>>,
}

/// An entry.
pub fn entry(c: &mut Choices<'_>) -> Entry {
    let mut words = None;
    let mut fields = Map::new();
    let name = c.pick(&["ava", "web-1", "a.b", "A_1", "0x", "podcastitlater-web", "x"]);
    let name = if c.rarely(12) { c.of("abzAZ019-_.", 20) } else { name.into() };
    fields.insert("name".into(), name.into());
    let base = if c.rarely(3) { c.of("abzAZ019+-._?=", 30) } else { "ava-1.0".into() };
    let path = match c.rarely(32) {
        true => "/nix/store/placeholder".into(),
        false => format!("/nix/store/{HASH}-{base}"),
    };
    fields.insert("artifact".into(), json!({"storePath": path}));
    let hosts: Vec<&str> = match c.below(4) {
        0 | 1 => vec!["biz"],
        2 => vec!["biz", "web-1.example.com"],
        _ => vec!["web-1.example.com"],
    };
    fields.insert("hosts".into(), json!(hosts));
    if c.rarely(2) {
        let command = if c.rarely(8) {
            c.text()
        } else {
            let said = command(c);
            let line = said
                .iter()
                .map(|word| shell_word(c, word))
                .collect::<Vec<_>>()
                .join(c.pick(&[" ", "  ", "\t"]));
            words = Some(said);
            line
        };
        fields.insert("exec".into(), json!({"command": command}));
    }
    if c.rarely(3) {
        let exec = fields.entry("exec").or_insert_with(|| json!({}));
        for key in ["user", "group"] {
            let user = c.pick(&["root", "www-data", "_x", "0", "1000", "A-b_c", "4294967294"]);
            exec[key] = if c.rarely(8) { c.of("abzAZ019-_.", 33) } else { user.into() }.into();
        }
    }
    let mut env = Map::new();
    for _ in 0..c.below(6) {
        let name = c.pick(&["PORT", "GREETING", "A", "_b", "PATH", "LONG_NAME_1"]);
        let name = if c.rarely(12) { c.of("abzAZ019_", 20) } else { name.into() };
        env.insert(name, c.text().into());
    }
    if c.rarely(2) {
        let port = if c.rarely(4) { c.number(2) as u16 } else { 8080 };
        if c.rarely(2) {
            env.insert("PORT".into(), port.to_string().into());
        }
        fields.insert("http".into(), http(c, port));
        if c.rarely(3) {
            fields.insert("rollout".into(), c.pick(&["overlap", "restart", "Overlap"]).into());
        }
    }
    if !env.is_empty() {
        fields.insert("env".into(), env.into());
    }
    if c.rarely(4) {
        fields.insert("envFile".into(), c.path().into());
    }
    if c.rarely(4) {
        let mut health = json!({"timeoutSec": c.number(1)});
        if c.rarely(2) {
            health["path"] = format!("/{}", c.of("abzAZ019/-._~!$&'()*+,;=:@?%", 20)).into();
            if c.rarely(3) {
                health["host"] = c.pick(&["www.example.com", "A.b", "*.b", ""]).into();
            }
        }
        fields.insert("health".into(), health);
    }
    if c.rarely(2) {
        fields.insert("systemd".into(), systemd(c));
    }
    if c.rarely(3) {
        let mut hardening = Map::new();
        for name in ["dynamicUser", "privateTmp", "protectHome"] {
            if c.rarely(2) {
                hardening.insert(name.into(), c.rarely(2).into());
            }
        }
        if c.rarely(2) {
            let word = c.pick(&["no", "yes", "full", "strict", "Yes"]);
            hardening.insert("protectSystem".into(), if c.rarely(4) { true.into() } else { word.into() });
        }
        fields.insert("hardening".into(), hardening.into());
    }
    if c.rarely(8) {
        fields.insert("revision".into(), c.text().into());
    }
    if c.rarely(8) {
        unknown(c, &mut fields);
    }
    if c.rarely(4) {
        let mut credentials = Map::new();
        for _ in 0..c.below(4) {
            let name = if c.rarely(2) { c.of("abzAZ019_-.", 20) } else { "tls.key".into() };
            credentials.insert(name, c.path().into());
        }
        fields.insert("credentials".into(), credentials.into());
    }
    if c.rarely(4) {
        let hardening = fields.entry("hardening").or_insert_with(|| json!({}));
        hardening["profile"] = c.pick(&["strict", "strict", "default", "Strict"]).into();
    }
    Entry { value: fields.into(), words }
}

/// A manifest of up to three entries.
pub fn manifest(c: &mut Choices<'_>) -> Value {
    let mut document = Map::new();
    document.insert("version".into(), if c.rarely(32) { c.number(1) } else { 1 }.into());
    document.insert("serial".into(), if c.rarely(4) { c.number(7) } else { 42 }.into());
    let generation = match c.rarely(4) {
        false => "2026-11-22T18:31:05Z".to_string(),
        true => format!(
            "{}-{:02}-{:02}{}{:02}:31:{:02}{}{}",
            c.pick(&["0000", "9999", "1970", "2026", "+10000", "-0001"]),
            c.below(14),
            c.below(33),
            c.pick(&["T", " ", "t"]),
            c.below(25),
            c.below(62),
            c.pick(&["", ".5", ".999999999"]),
            c.pick(&["Z", "+00:00", "-23:59", "+23:59", "z", ""]),
        ),
    };
    document.insert("generation".into(), generation.into());
    if c.rarely(3) {
        document.insert("change".into(), json!({"action": c.text(), "by": c.text()}));
    }
    if c.rarely(8) {
        document.insert("store".into(), c.text().into());
        document.insert("signatures".into(), json!([c.text()]));
    }
    if c.rarely(4) {
        unknown(c, &mut document);
    }
    let number = c.pick(&[1, 1, 1, 1, 1, 2, 3, 0]);
    let services: Vec<Value> = (0..number).map(|_| entry(c).value).collect();
    document.insert("services".into(), services.into());
    document.into()
}

fn command(c: &mut Choices<'_>) -> Vec<String> {
    let program = match c.below(10) {
        0..=4 => c.pick(&["bin/ava", "bin/serve", "/usr/bin/env", "ava", "bin/a b"]).to_string(),
        5..=7 => c.path(),
        _ => format!("bin/{}", c.text()),
    };
    std::iter::once(program).chain((0..c.below(6)).map(|_| c.text())).collect()
}

/// The word as somebody types it for a shell.
fn shell_word(c: &mut Choices<'_>, word: &str) -> String {
    let plain = |ch: char| ch.is_ascii_alphanumeric() || "/-_.".contains(ch);
    match c.below(4) {
        0 if !word.is_empty() && word.chars().all(plain) => word.to_string(),
        1 if !word.is_empty() => word.chars().flat_map(|ch| ['\\', ch]).collect(),
        2 => {
            let inner: String = word
                .chars()
                .flat_map(|ch| "\\\"$`".contains(ch).then_some('\\').into_iter().chain([ch]))
                .collect();
            format!("\"{inner}\"")
        }
        _ => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

fn http(c: &mut Choices<'_>, port: u16) -> Value {
    let domain = c.pick(&["ava.example.com", "*.example.com", "LOCALHOST"]);
    let domain = if c.rarely(6) { c.of("abzAZ019-.*", 24) } else { domain.into() };
    let mut http = json!({"domain": domain, "internalPort": port});
    if c.rarely(3) {
        http["path"] = format!("/{}", c.of("abzAZ019/-._~!$&'()+,;=:@", 20)).into();
    }
    if c.rarely(8) {
        http["portEnv"] = c.pick(&["PORT", "A", "1", ""]).into();
    }
    if c.rarely(8) {
        http["drainSec"] = c.number(2).into();
    }
    http
}

fn systemd(c: &mut Choices<'_>) -> Value {
    const UNITS: [&str; 6] = [
        "network-online.target",
        "postgresql.service",
        "a@b.service",
        "dev-sda\\x2d1.device",
        "a@.service",
        "x\\y.timer",
    ];
    const UNIT_CHARACTERS: &str = "abz019:-_.\\@";
    let mut fields = Map::new();
    let mut set = |name: &str, value: Value| {
        fields.insert(name.into(), value);
    };
    if c.rarely(3) {
        let suffixed = |name: String| if name.contains('.') { name } else { format!("{name}.service") };
        let after: Vec<String> = c.some(&UNITS, UNIT_CHARACTERS).into_iter().map(suffixed).collect();
        let requires: Vec<String> = c.some(&UNITS, UNIT_CHARACTERS).into_iter().map(suffixed).collect();
        set("after", after.into());
        set("requires", requires.into());
    }
    if c.rarely(4) {
        let words =
            ["no", "on-success", "on-failure", "on-abnormal", "on-watchdog", "on-abort", "always", "never"];
        set("restart", c.pick(&words).into());
        set("restartSec", c.number(2).into());
    }
    if c.rarely(3) {
        let inside = c.pick(&["", "private", "private/", "a/", "./"]);
        set("stateDirectory", format!("{inside}{}", c.path().trim_start_matches('/')).into());
    }
    if c.rarely(3) {
        set("readWritePaths", (0..c.below(3)).map(|_| c.path()).collect::<Vec<_>>().into());
    }
    if c.rarely(3) {
        let suffix = c.pick(&["", "K", "M", "G", "T", "%", "P"]);
        let amount =
            if c.rarely(8) { "infinity".into() } else { format!("{}{suffix}", c.of("0123456789.", 7)) };
        set("memoryMax", amount.into());
    }
    if c.rarely(3) {
        set("cpuQuota", format!("{}%", c.of("0123456789.", 8)).into());
    }
    if c.rarely(3) {
        set("workingDirectory", if c.rarely(6) { "/".into() } else { c.path() }.into());
    }
    if c.rarely(4) {
        set("stopTimeoutSec", c.number(2).into());
    }
    fields.into()
}

/// A field that only a newer version knows.
fn unknown(c: &mut Choices<'_>, fields: &mut Map<String, Value>) {
    let value = match c.below(7) {
        0 => Value::Null,
        1 => c.text().into(),
        2 => c.number(8).into(),
        3 => json!(c.number(8) as i64),
        4 => json!(f64::from_bits(c.number(8))),
        5 => json!([c.text(), {"x": f64::from_bits(c.number(8)) , "": [true, null]}]),
        _ => (0..c.below(140)).fold(json!(1), |inner, _| Value::Array(vec![inner])),
    };
    let name = if c.rarely(2) { c.text() } else { "later".into() };
    fields.insert(name, value);
}

//! `omni-deploy config`: the effective values and where each came from. Never prints a secret: keys are shown
//! as the path of their file, URLs without what authenticates.

use super::table::{Cell, Column, table};
use super::{Call, print};
use crate::config::{self, KEYS, Sourced};
use crate::error::{Exit, Result};
use crate::store::url::without_secrets;
use argh::{ArgsInfo, FromArgs};
use serde_json::{Map, Value, json};

/// Print the effective configuration and where each value came from.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "config",
    example = "{command_name}\nOMNI_DEPLOY_STORE=file:///tmp/s {command_name} --json | jq .settings.store",
    note = "A flag beats the environment, which beats ~/.config/omni-deploy/config.json, which beats /etc/omni-deploy/config.json."
)]
pub(super) struct Args {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    let settings = call.settings()?;
    let shown = |name: &str| {
        let Some(Sourced { value, source }) = settings.sources.get(name) else { return (None, "default") };
        (value.as_deref().map(without_secrets), source.as_str())
    };
    if args.json {
        let mut map = Map::new();
        for key in KEYS {
            let (value, source) = shown(key.name);
            let value = match value {
                Some(text) if key.list => config::words(&text).collect(),
                other => other.map_or(Value::Null, Value::from),
            };
            map.insert(key.name.into(), json!({"value": value, "source": source}));
        }
        print(&format!("{:#}", json!({"version": 1, "settings": map})))?;
        return Ok(Exit::Done);
    }
    let lines: Vec<Vec<Cell>> = KEYS
        .iter()
        .map(|key| {
            let (value, source) = shown(key.name);
            vec![key.name.into(), value.as_deref().unwrap_or("-").into(), source.into()]
        })
        .collect();
    print(&table(&[Column::Left, Column::AtMost(60)], &lines))?;
    Ok(Exit::Done)
}

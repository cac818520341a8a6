//! The load under which omni-deploy's tests deploy: `serve` is the service that is deployed, `load` sends it
//! requests on a schedule and checks every answer, `neighbour` holds WebSockets open and counts how often
//! they are cut. Results are JSON on stdout; what failed, and when, is told on stderr as it happens.

mod http;
mod load;
mod neighbour;
mod serve;

use std::process::ExitCode;

const USAGE: &str = "usage: omni-test-load serve
       omni-test-load load ADDRESS DOMAIN REQUESTS RATE AT_ONCE [EARLY]
       omni-test-load neighbour ADDRESS DOMAIN CONNECTIONS

serve      an echo service on 127.0.0.1:$PORT; src/serve.rs tells what it reads
load       sends REQUESTS requests and goes on until its stdin ends, RATE a second in bursts of AT_ONCE, whatever
           the answers; besides, EARLY clients connect up to four seconds before they send
neighbour  holds WebSockets open; prints its counts at every line of its stdin, ends with it

example: omni-test-load load 10.231.1.2:80 web.example.com 40000 500 16 </dev/null";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u32>().ok();
    let result = match args[..] {
        ["serve"] => serve::run(),
        ["load", address, domain, requests, rate, at_once, ref early @ ..] if early.len() <= 1 => {
            let early = early.first().map_or(Some(0), |e| number(e));
            match (number(requests), number(rate), number(at_once), early) {
                (Some(requests), Some(rate @ 1..), Some(at_once @ 1..), Some(early)) => {
                    let target = http::Target { address: address.into(), domain: domain.into() };
                    load::run(&target, &load::Schedule { requests: requests.into(), rate, at_once, early })
                }
                _ => return misuse(),
            }
        }
        ["neighbour", address, domain, connections] => match number(connections) {
            Some(connections) => {
                neighbour::run(&http::Target { address: address.into(), domain: domain.into() }, connections)
            }
            None => return misuse(),
        },
        _ => return misuse(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("omni-test-load: {e}");
            ExitCode::FAILURE
        }
    }
}

fn misuse() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

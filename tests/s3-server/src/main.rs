//! `omni-test-s3`: the S3 server that the product's tests run against.
//!
//! It owns what a test needs from S3 and real servers differ in: checked signatures, exact conditional
//! writes, IAM policies per user, paging, a log of requests to count, and faults on
//! demand. The protocol and the files are `s3s` and `s3s-fs`; see the modules for what is added. It is
//! never a store for data that matters: nothing is synced to disk.

mod access;
mod args;
mod body;
mod faults;
mod front;
mod store;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::host::SingleDomain;
use s3s::service::S3ServiceBuilder;

use args::Args;
use faults::Control;
use front::Front;
use store::Store;

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let result = Args::parse(std::env::args().skip(1)).and_then(|args| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(serve(args))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("omni-test-s3: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> Result<(), Error> {
    let Args { root, listen, users, buckets, log, connections, control, domain } = args;

    let control = Arc::new(Control::new(control));
    let store = Store::open(&root, Arc::clone(&control))?;
    for bucket in &buckets {
        store.ensure_bucket(bucket)?;
    }
    let users = Arc::new(users);
    let mut service = S3ServiceBuilder::new(store);
    service.set_auth(access::Auth(Arc::clone(&users)));
    service.set_access(access::Access { users, root });
    if let Some(domain) = &domain {
        service.set_host(SingleDomain::new(domain).map_err(|error| format!("--domain {domain}: {error}"))?);
    }
    let front = Arc::new(Front::new(service.build(), control, log.as_deref(), domain)?);

    let mut connections = connections.as_deref().map(front::appended).transpose()?;

    let listener = tokio::net::TcpListener::bind(&listen)
        .await
        .map_err(|error| format!("cannot listen on {listen}: {error}"))?;
    // Tests wait for this line and read the port from it.
    let mut stdout = std::io::stdout();
    writeln!(stdout, "listening http://{}", listener.local_addr()?)?;
    stdout.flush()?;

    loop {
        let (socket, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: others will be closed in a moment.
                eprintln!("omni-test-s3: accept: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        // Written before anything is read: who has an answer finds the line of its connection.
        if let Some(file) = &mut connections {
            writeln!(file, "{from}")?;
        }
        // Small answers must not wait for the client's delayed acknowledgement.
        socket.set_nodelay(true)?;
        let front = Arc::clone(&front);
        tokio::spawn(async move {
            let service = service_fn(|request| front.handle(request));
            // An error here is a client that left, or a reset that the test asked for.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

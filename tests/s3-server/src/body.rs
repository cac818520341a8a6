//! Two kinds of bodies: a request's that comes back unread, and an answer's that breaks off.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as HttpBody, Bytes, Frame, Incoming, SizeHint};
use s3s::{Body, StdError};
use tokio::sync::oneshot;

/// Lends a request's body to the S3 service. The receiver gets what the service left unread.
///
/// A server that answers without reading the body and closes the connection makes the client's system
/// forget the answer, so that a refused upload looks like a broken line.
pub fn lend(body: Incoming) -> (Body, oneshot::Receiver<Incoming>) {
    let (giver, receiver) = oneshot::channel();
    let lent = Lent(Some((body, giver)));
    (Body::http_body_unsync(lent), receiver)
}

struct Lent(Option<(Incoming, oneshot::Sender<Incoming>)>);

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.0 {
            Some((body, _)) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.0.as_ref();
        body.map_or(SizeHint::with_exact(0), |(body, _)| body.size_hint())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some((body, giver)) = self.0.take() {
            // Nobody waits for it if the client is gone.
            let _ = giver.send(body);
        }
    }
}

/// Reads a body to its end, or to where the client left.
pub async fn drain(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}

/// The first `bytes` of a body, and then an error, at which hyper closes the connection.
pub fn cut(body: Body, bytes: usize) -> Body {
    let frames = stream::unfold(Some((body, bytes)), |state| async {
        let (mut body, left) = state?;
        if left == 0 {
            // hyper drops what it has not written yet; the pause is for it to do so.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let error = StdError::from("the control file asks for a cut");
            return Some((Err(error), None));
        }
        let mut data = match body.frame().await? {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return Some((Err(error), None)),
        };
        data.truncate(left);
        let left = left - data.len();
        Some((Ok(Frame::data(data)), Some((body, left))))
    });
    Body::http_body_unsync(StreamBody::new(Box::pin(frames)))
}

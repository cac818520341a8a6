//! Which machine this is. Two machines that were given one `host` name report over each other, and each looks well
//! or ill by the other's report; the name alone cannot tell them apart.

use super::state::Machine;
use ring::hmac;

/// Set apart from what other programs derive from the same machine; made once, for this program.
const APPLICATION: [u8; 16] =
    [0x3f, 0x8c, 0x1d, 0x52, 0x6a, 0x0e, 0x4b, 0x97, 0x91, 0x7d, 0xc4, 0x2b, 0x58, 0xe6, 0x30, 0xaf];

/// This machine, as far as it has an identity.
pub fn this() -> Option<Machine> {
    let id = app_specific(&fs_err::read_to_string("/etc/machine-id").ok()?)?;
    let name = fs_err::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Some(Machine { id, name: name.trim().to_string() })
}

/// What sd_id128_get_machine_app_specific(3) makes of a machine's id: the id itself is not to be handed out
/// (machine-id(5)).
fn app_specific(machine_id: &str) -> Option<String> {
    let number = u128::from_str_radix(machine_id.trim(), 16).ok().filter(|n| *n != 0)?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, &number.to_be_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hmac::sign(&key, &APPLICATION).as_ref()[..16]);
    // The bits that make it a UUID of version 4.
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    Some(crate::hash::hex(&id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_the_one_that_systemd_derives_and_not_the_machines_id() {
        let id = "0123456789abcdef0123456789abcdef\n";
        let derived = app_specific(id).unwrap();
        assert_eq!(derived, "44a48c8857a04efbb70d43fd857fefa0");
        assert_ne!(app_specific("1123456789abcdef0123456789abcdef").unwrap(), derived);
        for none in ["", "uninitialized\n", "00000000000000000000000000000000"] {
            assert_eq!(app_specific(none), None);
        }
    }
}

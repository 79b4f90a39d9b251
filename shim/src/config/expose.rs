//! `io.chsnap.expose`: ports of the guest that the host can reach.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// One port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Expose {
    /// The port on the guest's loopback.
    pub guest_port: u16,
    /// Where the host listens besides the UNIX socket.
    pub listen: Option<SocketAddr>,
}

impl fmt::Display for Expose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.listen {
            Some(listen) => write!(f, "{listen}:{}", self.guest_port),
            None => write!(f, "{}", self.guest_port),
        }
    }
}

impl Expose {
    /// Reads a comma-separated list. The error says what is wrong with which item.
    pub(super) fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let mut all: Vec<Self> = Vec::new();
        for item in text.split(',').map(str::trim) {
            let expose = Self::parse(item)?;
            if let Some(listen) = expose.listen.filter(|_| all.iter().any(|other| other.listen == expose.listen)) {
                return Err(format!("{listen} stands there twice"));
            }
            if all.contains(&expose) {
                return Err(format!("port {} stands there twice", expose.guest_port));
            }
            all.push(expose);
        }
        Ok(all)
    }

    fn parse(item: &str) -> Result<Self, String> {
        let Some((listen, guest)) = item.rsplit_once(':') else {
            return Ok(Self { guest_port: port(item, item)?, listen: None });
        };
        let guest_port = port(guest, item)?;
        let Some((address, host)) = listen.rsplit_once(':') else { return Err(form(item)) };
        let host_port = port(host, item)?;
        let bracketed = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let address: IpAddr = match bracketed {
            Some(inner) => {
                IpAddr::V6(inner.parse().map_err(|_| format!("{item:?}: {inner:?} is not an IPv6 address"))?)
            }
            None => IpAddr::V4(address.parse().map_err(|_| match address.contains(':') {
                true => format!("{item:?}: write an IPv6 address in brackets, [::1]:18080:8080"),
                false => format!("{item:?}: {address:?} is not an IP address"),
            })?),
        };
        Ok(Self { guest_port, listen: Some(SocketAddr::new(address, host_port)) })
    }
}

fn port(text: &str, item: &str) -> Result<u16, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(form(item));
    }
    text.parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{item:?}: port {text} is not between 1 and 65535"))
}

fn form(item: &str) -> String {
    format!("{item:?} is not a port (8080) or an address with two ports (127.0.0.1:18080:8080, [::1]:18080:8080)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_back() {
        let text = "8080, 127.0.0.1:18080:8080,[::1]:18080:8080,0.0.0.0:1:65535";
        let list = Expose::parse_list(text).unwrap();
        assert_eq!(list[0], Expose { guest_port: 8080, listen: None });
        assert_eq!(list[1].listen, Some("127.0.0.1:18080".parse().unwrap()));
        assert_eq!(list[2].listen, Some("[::1]:18080".parse().unwrap()));
        let shown: Vec<String> = list.iter().map(Expose::to_string).collect();
        assert_eq!(shown.join(","), text.replace(' ', ""));
    }

    #[test]
    fn errors_name_the_item() {
        for (text, error) in [
            ("", "\"\" is not a port"),
            ("80,", "\"\" is not a port"),
            ("0", "port 0 is not between"),
            ("65536", "port 65536 is not between"),
            ("+80", "\"+80\" is not a port"),
            ("http", "\"http\" is not a port"),
            ("18080:8080", "is not a port (8080) or an address"),
            ("localhost:18080:8080", "\"localhost\" is not an IP address"),
            ("::1:18080:8080", "in brackets"),
            ("[127.0.0.1]:1:1", "\"127.0.0.1\" is not an IPv6 address"),
            ("127.0.0.1::8080", "is not a port (8080) or an address"),
            ("80,80", "port 80 stands there twice"),
            ("127.0.0.1:1:80,127.0.0.1:1:81", "127.0.0.1:1 stands there twice"),
        ] {
            let got = Expose::parse_list(text).unwrap_err();
            assert!(got.contains(error), "{text:?}: {got}");
        }
    }
}

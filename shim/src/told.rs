//! The log of the programs that are not the shim itself: containerd reads only the shim's.

use log::{LevelFilter, Log, Metadata, Record};

/// Has warnings told, each as one line, by `tell`. The first to call this decides for the process.
pub fn warnings(tell: fn(&str)) {
    if log::set_boxed_logger(Box::new(Lines(tell))).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

struct Lines(fn(&str));

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record<'_>) {
        // A library's own log is not for who uses the program.
        if self.enabled(record.metadata()) && record.target().starts_with("chsnap") {
            (self.0)(&record.args().to_string().replace('\n', " "));
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use log::Level;

    use super::*;

    static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    #[test]
    fn only_our_warnings_are_told() {
        let lines = Lines(|line| TOLD.lock().unwrap().push(line.into()));
        let log = |level, target, args| lines.log(&Record::builder().level(level).target(target).args(args).build());
        log(Level::Warn, "chsnap::agent", format_args!("two\nlines"));
        log(Level::Info, "chsnap::agent", format_args!("nothing of note"));
        log(Level::Error, "ttrpc", format_args!("somebody else's"));
        assert_eq!(*TOLD.lock().unwrap(), ["two lines"]);
    }
}

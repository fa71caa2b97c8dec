//! RFC 3339 times.

/// Seconds since 1970 and nanoseconds of `2006-01-02T15:04:05.999999999Z` or with `+07:00` at its end.
pub(super) fn parse(text: &str) -> Option<(i64, u32)> {
    let (date, rest) = text.split_at_checked(10)?;
    let rest = rest.strip_prefix(['T', 't'])?;
    let (clock, rest) = rest.split_at_checked(8)?;
    let [year, month, day] = fields(date, '-')?;
    let [hour, minute, second] = fields(clock, ':')?;
    let valid = (1..=12).contains(&month) && (1..=31).contains(&day) && year <= 9999;
    if !valid || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (fraction, zone) = match rest.strip_prefix('.') {
        None => ("", rest),
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?),
    };
    let nanos = match fraction.get(..fraction.len().min(9))? {
        "" => 0,
        digits => digits.parse::<u32>().ok()? * 10u32.pow(9 - u32::try_from(digits.len()).ok()?),
    };
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some((seconds - offset(zone)?, nanos))
}

fn fields(text: &str, separator: char) -> Option<[i64; 3]> {
    let mut fields = text.split(separator).map(|field| {
        field.bytes().all(|byte| byte.is_ascii_digit()).then(|| field.parse().ok())?
    });
    let found = [fields.next()??, fields.next()??, fields.next()??];
    fields.next().is_none().then_some(found)
}

/// Seconds east of Greenwich.
fn offset(zone: &str) -> Option<i64> {
    let sign = match zone.chars().next()? {
        'Z' | 'z' => return (zone.len() == 1).then_some(0),
        '+' => 1,
        '-' => -1,
        _ => return None,
    };
    let [hours, minutes, _] = fields(&format!("{}:0", &zone[1..]), ':')?;
    (hours < 24 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

/// Days since 1970 of a day in the Gregorian calendar, counting years from March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month > 2 { year } else { year - 1 };
    let month = (month + 9) % 12;
    let leap = year / 4 - year / 100 + year / 400;
    year * 365 + leap + (month * 306 + 5) / 10 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn times() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some((0, 0))),
            ("2019-08-20T10:30:43Z", Some((1_566_297_043, 0))),
            ("2000-02-29T23:59:59.5Z", Some((951_868_799, 500_000_000))),
            ("2024-03-01T00:00:00.000000001+01:00", Some((1_709_247_600, 1))),
            ("1969-12-31T23:59:58.25-00:00", Some((-2, 250_000_000))),
            ("0001-01-01T00:00:00Z", Some((-62_135_596_800, 0))),
            ("2019-08-20 10:30:43Z", None),
            ("2019-08-20T10:30:43", None),
            ("2019-13-20T10:30:43Z", None),
            ("2019-08-20T10:30:43.Zx", None),
            ("+019-08-20T10:30:43Z", None),
            ("2019-08-20T10:30:43+1é", None),
            ("", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}

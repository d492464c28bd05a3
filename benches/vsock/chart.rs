//! The chart: a row for each case, with a bar for each daemon, its speed on the left and its CPU time on the right. Each row
//! has a scale of its own, from zero to its longest bar or the machine's limit: cases have nothing else in common.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::cases::Kind;
use crate::machine::Machine;
use crate::measure::key;
use crate::report::{CaseResult, Entry, number};
use crate::uml;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Sizes in pixels.
const WIDTH: i32 = 1120;
const MARGIN: i32 = 16;
const TOP: i32 = 76;
const BOTTOM: i32 = 62;
const BAR: i32 = 14;
const ROW_GAP: i32 = 12;
const HEADING: i32 = 34;
/// The width of a character of the small text, about.
const CHARACTER: i32 = 7;

/// The panel of the speeds, and that of the CPU times.
const PANELS: [Panel; 2] = [
    Panel {
        left: 250,
        width: 300,
    },
    Panel {
        left: 740,
        width: 200,
    },
];

const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const FAINT: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
const GREY: RGBColor = RGBColor(0x57, 0x60, 0x6a);
const LIMIT: RGBColor = RGBColor(0xcf, 0x22, 0x2e);
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x6f, 0xeb),
    RGBColor(0xbf, 0x87, 0x00),
    RGBColor(0x8c, 0x95, 0x9f),
    RGBColor(0x82, 0x50, 0xdf),
];

/// Where bars begin, and how long the longest is.
struct Panel {
    left: i32,
    width: i32,
}

/// What the length of a bar says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Speed,
    Time,
    Memory,
}

const SECTIONS: [(Section, &str); 3] = [
    (Section::Speed, "Speed: longer is better"),
    (Section::Time, "Time: shorter is better"),
    (Section::Memory, "Memory: shorter is better"),
];

/// A daemon's result, and what is written beside it.
struct Bar {
    value: Option<f64>,
    figure: String,
}

/// The bars of a case, one for each daemon.
struct Row {
    name: String,
    section: Section,
    main: Vec<Bar>,
    cpu: Vec<Bar>,
    limit: Option<f64>,
}

/// What stands above and below the rows.
struct Caption<'a> {
    names: Vec<&'a str>,
    baseline: &'a str,
    machine: &'a Machine,
    runs: usize,
}

/// Draws the cases to `path`, except for those that are about a single daemon among several.
pub fn draw(
    path: &Path,
    results: &[CaseResult],
    machine: &Machine,
    baseline: &str,
    runs: usize,
) -> Drawn {
    let compares = |result: &&CaseResult| {
        let with_results = result.entries.iter().filter(|entry| !entry.runs.is_empty());
        with_results.count() >= result.entries.len().min(2)
    };
    let shown = results.iter().filter(compares);
    let rows: Vec<Row> = shown.map(|result| row(result, baseline)).collect();
    let names = results.first().map(|result| {
        let entries = result.entries.iter();
        entries.map(|entry| entry.name.as_str()).collect()
    });
    let caption = Caption {
        names: names.unwrap_or_default(),
        baseline,
        machine,
        runs,
    };
    let row_height = BAR * caption.names.len().max(1) as i32 + ROW_GAP;
    let has = |section| rows.iter().any(|row| row.section == section);
    let headings = SECTIONS.iter().filter(|(section, _)| has(*section)).count();
    let height = TOP + row_height * rows.len() as i32 + HEADING * headings as i32 + BOTTOM;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    // Opaque: the page behind it may be dark.
    area.fill(&WHITE)?;
    head(&area, &caption)?;
    let mut top = TOP;
    for (section, heading) in SECTIONS.iter().filter(|(section, _)| has(*section)) {
        section_heading(&area, heading, top)?;
        top += HEADING;
        for row in rows.iter().filter(|row| row.section == *section) {
            draw_row(&area, row, top)?;
            top += row_height;
        }
    }
    foot(&area, &caption, height)?;
    area.present()?;
    Ok(())
}

fn row(result: &CaseResult, baseline: &str) -> Row {
    let headline = result.case.kind.headline();
    let base = result.baseline(baseline);
    let bars = |key: &str| {
        let entries = result.entries.iter();
        entries.map(|entry| bar(entry, base, key)).collect()
    };
    let cpu = cpu_key(result.case.kind);
    let limit = result.limit.as_ref();
    Row {
        name: result.case.name.into(),
        section: section(headline),
        main: bars(headline),
        cpu: cpu.map(bars).unwrap_or_default(),
        limit: limit.and_then(|limit| limit.median(headline)),
    }
}

fn bar(entry: &Entry, base: Option<&Entry>, key: &str) -> Bar {
    let value = entry.median(key);
    let figure = match value {
        Some(value) => {
            let other = base.filter(|base| base.name != entry.name);
            let ratio = other.and_then(|base| Some(value / base.median(key)?));
            let ratio = ratio.filter(|ratio| ratio.is_finite());
            let times = ratio.map(|ratio| format!(" · {}×", number(ratio)));
            format!(
                "{} {}{}",
                number(value),
                unit(key),
                times.unwrap_or_default()
            )
        }
        None if entry.unsupported.is_some() => "not supported".into(),
        None => "failed".into(),
    };
    Bar { value, figure }
}

fn section(headline: &str) -> Section {
    match headline {
        key::MIB_PER_S | key::OPS_PER_S | key::KEPT => Section::Speed,
        key::ANON_KIB | key::ANON_KIB_PER_CONN => Section::Memory,
        _ => Section::Time,
    }
}

fn cpu_key(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Streams { .. } | Kind::Messages { .. } | Kind::Siblings { .. } => {
            Some(key::CPU_S_PER_GIB)
        }
        Kind::Uml(uml::Traffic::RequestResponse) => Some(key::CPU_US_PER_OP),
        Kind::Uml(uml::Traffic::Streams { .. }) | Kind::Fairness { .. } => Some(key::CPU_S_PER_GIB),
        Kind::RequestResponse | Kind::MessageRoundTrip | Kind::SiblingRoundTrip(_) => {
            Some(key::CPU_US_PER_OP)
        }
        Kind::Connect | Kind::Short(_) | Kind::Echo(_) | Kind::Growth(_) => {
            Some(key::CPU_US_PER_OP)
        }
        Kind::Idle(_) | Kind::IdleDaemons(_) | Kind::StartUp => None,
        Kind::Quiet { .. } | Kind::Flooded { .. } | Kind::StandStill { .. } => None,
    }
}

fn unit(key: &str) -> &'static str {
    match key {
        key::MIB_PER_S => "MiB/s",
        key::OPS_PER_S => "/s",
        key::P50_US => "µs (p50)",
        key::P99_US => "µs (p99)",
        key::US_PER_OP | key::CPU_US_PER_OP => "µs",
        key::ANON_KIB => "KiB",
        key::ANON_KIB_PER_CONN => "KiB each",
        key::START_UP_MS | key::STILL_P50_MS => "ms",
        key::KEPT => "kept",
        _ => "s/GiB",
    }
}

fn head(area: &Area<'_>, caption: &Caption<'_>) -> Drawn {
    let mut x = MARGIN;
    for (i, name) in caption.names.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()].filled();
        area.draw(&Rectangle::new([(x, 16), (x + 12, 28)], colour))?;
        text(area, name, (x + 20, 22), 14, &INK, HPos::Left)?;
        x += 44 + (CHARACTER + 1) * name.chars().count() as i32;
    }
    area.draw(&limit_mark(x, 15, 29))?;
    let limit = "limit of the machine";
    text(area, limit, (x + 10, 22), 14, &INK, HPos::Left)?;
    let cpu = "The daemon's CPU time for the same work: shorter is better";
    let at = (PANELS[1].left, 56);
    text(area, cpu, at, 13, &GREY, HPos::Left)
}

fn foot(area: &Area<'_>, caption: &Caption<'_>, height: i32) -> Drawn {
    let note = format!(
        "Medians of {} runs. Each row has its own scale, from zero. × is the ratio to {}.",
        caption.runs, caption.baseline
    );
    let at = (MARGIN, height - 42);
    text(area, &note, at, 12, &GREY, HPos::Left)?;
    let machine = caption.machine.line();
    let at = (MARGIN, height - 20);
    text(area, &machine, at, 12, &GREY, HPos::Left)
}

fn section_heading(area: &Area<'_>, heading: &str, top: i32) -> Drawn {
    let y = top + HEADING / 2;
    let line = vec![(MARGIN, y + 13), (WIDTH - MARGIN, y + 13)];
    area.draw(&PathElement::new(line, FAINT))?;
    text(area, heading, (MARGIN, y), 14, &INK, HPos::Left)
}

fn draw_row(area: &Area<'_>, row: &Row, top: i32) -> Drawn {
    let top = top + ROW_GAP / 2;
    let height = BAR * row.main.len() as i32;
    let label = (PANELS[0].left - 12, top + height / 2);
    text(area, &row.name, label, 13, &INK, HPos::Right)?;
    let [main, cpu] = &PANELS;
    let longest = |bars: &[Bar], limit: Option<f64>| {
        let values = bars.iter().filter_map(|bar| bar.value).chain(limit);
        values.fold(f64::MIN_POSITIVE, f64::max)
    };
    let scale = longest(&row.main, row.limit);
    draw_bars(area, &row.main, main, scale, top)?;
    draw_bars(area, &row.cpu, cpu, longest(&row.cpu, None), top)?;
    if let Some(limit) = row.limit {
        let x = main.x(limit / scale);
        area.draw(&limit_mark(x, top - 2, top + height + 2))?;
    }
    Ok(())
}

impl Panel {
    fn x(&self, share: f64) -> i32 {
        self.left + (f64::from(self.width) * share.clamp(0.0, 1.0)).round() as i32
    }
}

fn draw_bars(area: &Area<'_>, bars: &[Bar], panel: &Panel, scale: f64, top: i32) -> Drawn {
    for (i, bar) in bars.iter().enumerate() {
        let top = top + BAR * i as i32;
        if let Some(value) = bar.value {
            let right = panel.x(value / scale).max(panel.left + 1);
            let corners = [(panel.left, top + 1), (right, top + BAR - 1)];
            let colour = COLOURS[i % COLOURS.len()];
            area.draw(&Rectangle::new(corners, colour.filled()))?;
        }
        let at = (panel.left + panel.width + 10, top + BAR / 2);
        text(area, &bar.figure, at, 12, &INK, HPos::Left)?;
    }
    Ok(())
}

fn limit_mark(x: i32, top: i32, bottom: i32) -> PathElement<(i32, i32)> {
    PathElement::new(vec![(x, top), (x, bottom)], LIMIT.stroke_width(2))
}

fn text(
    area: &Area<'_>,
    content: &str,
    at: (i32, i32),
    size: i32,
    colour: &RGBColor,
    across: HPos,
) -> Drawn {
    let style = ("sans-serif", size).into_font().color(colour);
    let style = style.pos(Pos::new(across, VPos::Center));
    area.draw(&Text::new(content.to_string(), at, style))?;
    Ok(())
}

//! The chart: how many times better than the baseline each daemon is in each case, and how many times less CPU it uses.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::cases::Kind;
use crate::measure::key;
use crate::report::{CaseResult, Entry, number};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Sizes in pixels.
const WIDTH: i32 = 1040;
const LABELS: i32 = 210;
const GAP: i32 = 30;
const FIGURES: i32 = 140;
const TOP: i32 = 76;
const BOTTOM: i32 = 44;
const BAR: i32 = 16;
const ROW_GAP: i32 = 12;

const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const FAINT: RGBColor = RGBColor(0xd0, 0xd7, 0xde);
const GREY: RGBColor = RGBColor(0x57, 0x60, 0x6a);
const LIMIT: RGBColor = RGBColor(0xcf, 0x22, 0x2e);
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x6f, 0xeb),
    RGBColor(0x2d, 0xa4, 0x4e),
    RGBColor(0xbf, 0x87, 0x00),
    RGBColor(0x82, 0x50, 0xdf),
];
const TICKS: [f64; 13] = [
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0,
];

/// A bar: how many times better than the baseline, and the figure beside it.
struct Bar {
    ratio: Option<f64>,
    figure: String,
}

/// The bars of a case, one for each daemon.
struct Row {
    name: String,
    speed: Vec<Bar>,
    cpu: Vec<Bar>,
    limit: Option<f64>,
}

/// A logarithmic axis of ratios.
struct Panel {
    left: i32,
    right: i32,
    /// Where the figures end.
    end: i32,
    low: f64,
    high: f64,
}

impl Panel {
    fn x(&self, ratio: f64) -> i32 {
        let share = (ratio / self.low).ln() / (self.high / self.low).ln();
        self.left + (f64::from(self.right - self.left) * share.clamp(0.0, 1.0)).round() as i32
    }
}

/// Draws all cases to `path`.
pub fn draw(path: &Path, results: &[CaseResult], baseline: &str, runs: usize) -> Drawn {
    let rows: Vec<Row> = results.iter().map(|result| row(result, baseline)).collect();
    let names: Vec<&str> = results
        .first()
        .map(|result| {
            others(result, baseline)
                .map(|entry| entry.name.as_str())
                .collect()
        })
        .unwrap_or_default();
    let row_height = BAR * names.len().max(1) as i32 + ROW_GAP;
    let height = TOP + row_height * rows.len() as i32 + BOTTOM;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let middle = LABELS + (WIDTH - LABELS - GAP) * 3 / 5;
    let panels = [
        panel(
            LABELS,
            middle,
            rows.iter().flat_map(|row| row.speed.iter()),
            &rows,
        ),
        panel(
            middle + GAP,
            WIDTH - 16,
            rows.iter().flat_map(|row| row.cpu.iter()),
            &[],
        ),
    ];
    head(&area, &panels, &names, baseline, runs)?;
    for panel in &panels {
        axis(&area, panel, height)?;
    }
    for (i, row) in rows.iter().enumerate() {
        let top = TOP + row_height * i as i32 + ROW_GAP / 2;
        draw_row(&area, row, &panels, top, row_height - ROW_GAP)?;
    }
    let note = "Logarithmic. Bars start at 1, where a daemon equals the baseline; further right is better.";
    text(&area, note, (LABELS, height - 10), 12, &GREY, HPos::Left)?;
    area.present()?;
    Ok(())
}

fn others<'a>(result: &'a CaseResult, baseline: &'a str) -> impl Iterator<Item = &'a Entry> {
    result
        .entries
        .iter()
        .filter(move |entry| entry.name != baseline)
}

fn row(result: &CaseResult, baseline: &str) -> Row {
    let kind = result.case.kind;
    let headline = kind.headline();
    let higher_is_better = matches!(headline, key::MIB_PER_S | key::OPS_PER_S);
    let base = result.baseline(baseline);
    let ratio = |entry: &Entry, key: &str, higher_is_better: bool| {
        let (own, base) = (entry.median(key)?, base?.median(key)?);
        let ratio = if higher_is_better {
            own / base
        } else {
            base / own
        };
        (ratio.is_finite() && ratio > 0.0).then_some(ratio)
    };
    let bars = |key: &str, higher_is_better: bool| {
        others(result, baseline)
            .map(|entry| {
                let own = entry.median(key);
                let ratio = own.and_then(|_| ratio(entry, key, higher_is_better));
                let mut figure = own.map_or_else(|| "failed".into(), |own| figure(own, key));
                if key == headline && base.is_some_and(|base| base.median(key).is_none()) {
                    figure += &format!(", {baseline} failed");
                }
                Bar { ratio, figure }
            })
            .collect()
    };
    let cpu_key = match kind {
        Kind::Streams { .. } | Kind::Messages { .. } | Kind::Siblings { .. } | Kind::Uml(_) => {
            Some(key::CPU_S_PER_GIB)
        }
        Kind::Idle(_) | Kind::StartUp | Kind::Flooded { .. } => None,
        _ => Some(key::CPU_US_PER_OP),
    };
    let limit = result.limit.as_ref();
    Row {
        name: result.case.name.into(),
        speed: bars(headline, higher_is_better),
        cpu: cpu_key.map(|key| bars(key, false)).unwrap_or_default(),
        limit: limit.and_then(|limit| ratio(limit, headline, higher_is_better)),
    }
}

fn figure(value: f64, key: &str) -> String {
    let unit = match key {
        key::MIB_PER_S => "MiB/s",
        key::OPS_PER_S => "/s",
        key::P50_US | key::P99_US | key::CPU_US_PER_OP => "µs",
        key::ANON_KIB_PER_CONN => "KiB each",
        key::START_UP_MS => "ms",
        _ => "s/GiB",
    };
    format!("{} {unit}", number(value))
}

fn panel<'a>(left: i32, end: i32, bars: impl Iterator<Item = &'a Bar>, rows: &[Row]) -> Panel {
    let limits = rows.iter().filter_map(|row| row.limit);
    let ratios: Vec<f64> = bars.filter_map(|bar| bar.ratio).chain(limits).collect();
    let lowest = ratios.iter().copied().fold(0.9, f64::min);
    let highest = ratios.iter().copied().fold(2.0, f64::max);
    Panel {
        left,
        right: end - FIGURES,
        end,
        low: lowest * 0.95,
        high: highest * 1.1,
    }
}

fn head(
    area: &Area<'_>,
    panels: &[Panel; 2],
    names: &[&str],
    baseline: &str,
    runs: usize,
) -> Drawn {
    let [speed, cpu] = panels;
    let title = format!("How many times better than {baseline}");
    text(area, &title, (16, 22), 17, &INK, HPos::Left)?;
    text(
        area,
        "speed (or latency, memory)",
        (speed.left, 50),
        13,
        &INK,
        HPos::Left,
    )?;
    text(
        area,
        "the daemon's CPU time for the same work",
        (cpu.left, 50),
        13,
        &INK,
        HPos::Left,
    )?;
    let mut x = WIDTH - 16;
    let median = format!("median of {runs} runs");
    text(area, &median, (x, 22), 12, &GREY, HPos::Right)?;
    x -= 150;
    text(
        area,
        "limit of the machine",
        (x, 22),
        12,
        &GREY,
        HPos::Right,
    )?;
    x -= 132;
    area.draw(&PathElement::new(
        vec![(x, 15), (x, 29)],
        LIMIT.stroke_width(2),
    ))?;
    for (i, name) in names.iter().enumerate().rev() {
        x -= 20;
        text(area, name, (x, 22), 12, &GREY, HPos::Right)?;
        x -= 18 + 7 * name.chars().count() as i32;
        let colour = COLOURS[i % COLOURS.len()].filled();
        area.draw(&Rectangle::new([(x, 16), (x + 12, 28)], colour))?;
    }
    Ok(())
}

fn axis(area: &Area<'_>, panel: &Panel, height: i32) -> Drawn {
    let bottom = height - BOTTOM;
    for tick in TICKS {
        if tick < panel.low || tick > panel.high {
            continue;
        }
        let x = panel.x(tick);
        let colour = if tick == 1.0 { INK } else { FAINT };
        area.draw(&PathElement::new(vec![(x, TOP - 6), (x, bottom)], colour))?;
        let label = format!("{tick}×");
        text(area, &label, (x, bottom + 12), 11, &GREY, HPos::Center)?;
    }
    Ok(())
}

fn draw_row(area: &Area<'_>, row: &Row, panels: &[Panel; 2], top: i32, height: i32) -> Drawn {
    let middle = top + height / 2;
    text(
        area,
        &row.name,
        (LABELS - 10, middle),
        13,
        &INK,
        HPos::Right,
    )?;
    for (panel, bars) in panels.iter().zip([&row.speed, &row.cpu]) {
        for (i, bar) in bars.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            draw_bar(area, bar, panel, top + BAR * i as i32, colour)?;
        }
    }
    if let Some(limit) = row.limit {
        let x = panels[0].x(limit);
        let line = vec![(x, top - 2), (x, top + height + 2)];
        area.draw(&PathElement::new(line, LIMIT.stroke_width(2)))?;
    }
    Ok(())
}

fn draw_bar(area: &Area<'_>, bar: &Bar, panel: &Panel, top: i32, colour: RGBColor) -> Drawn {
    let one = panel.x(1.0);
    let end = bar.ratio.map_or(one, |ratio| panel.x(ratio));
    let corners = [(one.min(end), top + 1), (one.max(end), top + BAR - 1)];
    area.draw(&Rectangle::new(corners, colour.filled()))?;
    let label = match bar.ratio {
        Some(ratio) => format!("{}× · {}", number(ratio), bar.figure),
        None => bar.figure.clone(),
    };
    let at = (panel.end, top + BAR / 2);
    text(area, &label, at, 12, &INK, HPos::Right)
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

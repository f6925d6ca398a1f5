// A study: the viewer, the heatmap of the chosen finding, and what a reader says of the findings.

import { SessionEnded, announce, ask, localiseTimes, repeat } from "./session.js";
import { Viewer } from "./viewer.js";

const WATCH_SECONDS = 10;
const find = (id) => document.getElementById(id);
const spaced = (name) => name.replaceAll("_", " ");

localiseTimes(document);
const table = find("findings");
const element = find("viewer");
if (element) openViewer();
if (table?.dataset.review) table.addEventListener("click", onReview);
repeat(watchSession, WATCH_SECONDS);

async function watchSession() {
  try {
    await ask(find("session").dataset.watch);
  } catch {
    // Covered already, or the service is away: what is shown stays valid.
  }
}

function openViewer() {
  const viewer = new Viewer(element, find("canvas"), showNumbers);
  const heat = find("heat");
  const heats = new Map();
  const chosen = () => table.querySelector("input[name=finding]:checked").value;

  async function showHeat() {
    const finding = chosen();
    if (!heat.checked) {
      viewer.showHeat(null);
      say("");
      return;
    }
    say(`Computing the heatmap of ${spaced(finding)}`);
    // A heatmap that cannot be had today may be had on the next try.
    if (!heats.has(finding)) heats.set(finding, picture(`${element.dataset.heat}${encodeURIComponent(finding)}.png`));
    try {
      const drawn = await heats.get(finding);
      if (!heat.checked || finding !== chosen()) return;
      viewer.showHeat(drawn);
      const words = isClear(drawn) ? `Nothing on the film speaks for ${spaced(finding)}` : `Heatmap: ${spaced(finding)}`;
      say(words);
      announce(words);
    } catch (error) {
      heats.delete(finding);
      if (error instanceof SessionEnded) return;
      viewer.showHeat(null);
      say(`No heatmap: ${error.message}`);
      announce(`No heatmap: ${error.message}`);
    }
  }

  function toggleHeat() {
    heat.checked = !heat.checked;
    if (!heat.checked) announce("Heatmap hidden");
    showHeat();
  }

  heat.addEventListener("change", showHeat);
  // Not "change": the finding that is chosen already can be asked for too. Keys that choose one click as well.
  table.addEventListener("click", (event) => {
    if (event.target.name !== "finding") return;
    heat.checked = true;
    showHeat();
  });
  find("opacity").addEventListener("input", (event) => viewer.setOpacity(event.target.value / 100));
  for (const where of [element, table]) {
    where.addEventListener("keydown", (event) => {
      if (event.key.toLowerCase() === "h" && !event.ctrlKey && !event.metaKey && !event.altKey) toggleHeat();
    });
  }
  document.querySelector(".tools").addEventListener("click", (event) => {
    const tools = {
      in: () => viewer.zoomBy(1.25),
      out: () => viewer.zoomBy(0.8),
      invert: () => viewer.invert(),
      reset: () => viewer.reset(),
    };
    tools[event.target.dataset.tool]?.();
  });
  picture(element.dataset.film).then(
    (film) => {
      viewer.show(film);
      viewer.setOpacity(find("opacity").value / 100);
      say("");
      element.dataset.loaded = "true";
      if (document.activeElement === document.body) element.focus({ preventScroll: true });
      if (heat.checked) showHeat();
    },
    (error) => say(`No film: ${error.message}`),
  );
}

function say(words) {
  find("state").textContent = words;
}

async function picture(url) {
  const answer = await ask(url);
  if (!answer.ok) throw new Error(await problem(answer));
  return createImageBitmap(await answer.blob());
}

// Whether nothing can be seen of a picture.
function isClear(drawn) {
  const edge = 64;
  const context = Object.assign(document.createElement("canvas"), { width: edge, height: edge }).getContext("2d");
  context.drawImage(drawn, 0, 0, edge, edge);
  return context.getImageData(0, 0, edge, edge).data.every((value, index) => index % 4 !== 3 || value === 0);
}

async function problem(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `the service answered ${answer.status}`;
  }
}

function showNumbers({ window, place, inverted }) {
  find("width").value = Math.round(window.width);
  find("level").value = Math.round(window.level);
  find("zoom").value = Math.round(place.zoom * 100);
  document.querySelector("[data-tool=invert]").setAttribute("aria-pressed", inverted);
}

async function onReview(event) {
  const button = event.target.closest("button[data-verdict]");
  if (!button || button.getAttribute("aria-disabled")) return;
  const row = button.closest("tr");
  const { finding } = row.dataset;
  const { verdict } = button.dataset;
  const buttons = row.querySelectorAll("button[data-verdict]");
  buttons.forEach((one) => one.setAttribute("aria-disabled", "true"));
  try {
    const query = verdict ? `?verdict=${verdict}` : "";
    const answer = await ask(`${table.dataset.review}${finding}/review${query}`, { method: "PUT" });
    if (!answer.ok) throw new Error(await problem(answer));
    const { reviews } = await answer.json();
    showVerdict(row, reviews.find((review) => review.finding === finding));
  } catch (error) {
    if (error instanceof SessionEnded) return;
    announce(`${spaced(finding)}: not saved, ${error.message}`);
    const said = row.querySelector(".said");
    said.hidden = false;
    said.querySelector(".by").textContent = `not saved: ${error.message}`;
  } finally {
    buttons.forEach((one) => one.removeAttribute("aria-disabled"));
  }
}

function showVerdict(row, review) {
  const said = row.querySelector(".said");
  said.hidden = !review;
  said.querySelector(".verdict").textContent = review?.verdict ?? "";
  const by = said.querySelector(".by");
  by.textContent = review ? `by ${review.reviewer}` : "";
  by.title = review?.reviewer ?? "";
  if (review) row.dataset.verdict = review.verdict;
  else delete row.dataset.verdict;
  const hadFocus = row.contains(document.activeElement);
  for (const button of row.querySelectorAll("button[data-verdict]")) button.hidden = Boolean(button.dataset.verdict) === Boolean(review);
  if (hadFocus) row.querySelector("button[data-verdict]:not([hidden])").focus();
  announce(`${spaced(row.dataset.finding)}: ${review ? review.verdict : "verdict taken back"}`);
}
